"""Coverage-guided fuzz of what reads bytes from others: records and data files.

    python tests/fuzz.py --target record --seconds 600 --out record.json
    python tests/fuzz.py --target dataset --seconds 600 --out dataset.json

Each input is either read or refused by the one declared error, in one line; anything else is an escape. It is kept
in the folder of `--escapes` and counted, and the search goes on. Needs atheris: pip install atheris (Linux, x86_64)."""
import argparse
import io
import json
import os
import random
import re
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault('HF_HUB_OFFLINE', '1')
try: import atheris
except ImportError: sys.exit('The fuzzer needs atheris, which has wheels for Linux on x86_64: pip install atheris')

import pyarrow as pa
import pyarrow.parquet as pq
import torch  # before anything is instrumented, and not worth it

with atheris.instrument_imports(include=['medpeft_study.records', 'medpeft_study.data', 'medpeft_study.config', 'json', 'csv', 'jsonschema']):
    import jsonschema

    import medpeft_study.data as data
    import medpeft_study.records as records
from medpeft_study.config import project_root

ENDINGS = ('csv', 'jsonl', 'parquet')


def refused(error):
    "Whether an error's message is one sentence of bearable length"
    text = str(error)
    assert '\n' not in text and 10 < len(text) < 1000, text
    return True


def record(content, path):
    "Bytes of a file -> a record that can be written and read again, or `RecordError`"
    path.write_bytes(content)
    try: found = records.read_record(path)
    except records.RecordError as e: return refused(e)
    records.write_record(found, path)
    assert records.read_record(path) == found


def dataset(content, path):
    "A byte for the format, and the bytes of a file -> items that can be named, or `DataError`"
    if not content: return
    path = path.with_suffix('.' + ENDINGS[content[0] % 3])
    path.write_bytes(content[1:])
    try: rows, _ = data.our_rows(data.local_rows(path), data.DATASETS['phenotype-qa'], 'domain', path.name)
    except data.DataError as e: return refused(e)
    items = data.make_items(dict(domain=rows))
    assert len(items) == len(rows) and len(data.fingerprint(items)) == 16
    data.trivial_baselines(items)


TARGETS = dict(record=record, dataset=dataset)


def seeds(target):
    "Inputs to begin with: what is right, and what is nearly so"
    if target == 'record':
        path = sorted((project_root() / 'reports' / 'records').glob('qlora-*.json'))[0]
        whole = json.loads(path.read_text())
        small = dict(whole, metrics=whole['metrics'][:1], history=whole['history'][:1], ranks=dict(list(whole['ranks'].items())[:1]), config={}, data=dict(fingerprints={}, rows={}))
        failed = {k: whole[k] for k in ('schema', 'protocol_version', 'run_id', 'study', 'provenance')} | dict(status='failed', error='DataError: no', config={})
        return [json.dumps(x).encode() for x in (small, failed, {}, [], dict(schema=2))]
    rows = [dict(item_id=f'i{n}', question='Which is it?', choices=['a', 'b', 'NA'], answer=n % 3) for n in range(3)]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink, compression='none')
    csv = 'item_id,question,choices,answer\n' + ''.join(f'{r["item_id"]},{r["question"]},"[""a"", ""b"", ""NA""]",{r["answer"]}\n' for r in rows)
    return [b'\0' + csv.encode(), b'\1' + '\n'.join(map(json.dumps, rows)).encode(), b'\2' + sink.getvalue()]


ODD = [None, True, False, 0, -1, 1, 2, 1.5, -0.0, 1e308, 2 ** 63, 10 ** 400, '', 'a', '\0', '\ud800', '\x1b[2J', '../../x', 'NaN', '<script>', [], {}, [[]], {'': None}, 'x' * 3000, 'failed', 'complete']


def changed(value, draw):
    "JSON with one place of it changed: a value replaced, a field dropped, doubled or renamed"
    if isinstance(value, (dict, list)) and value and draw.random() < .85:
        out = value.copy()
        key = draw.choice(list(out) if isinstance(out, dict) else range(len(out)))
        kind = draw.random()
        if kind < .75: out[key] = changed(out[key], draw)
        elif kind < .85: del out[key]
        elif isinstance(out, list): out.insert(key, draw.choice(ODD))
        else: out[str(draw.choice(ODD))] = out[key]
        return out
    return draw.choice(ODD)


def mutate(target):
    "Half of the inputs are changed as bytes, half as what they mean"
    def mutator(content, most, seed):
        draw = random.Random(seed)
        try:
            if draw.random() < .5: raise ValueError
            if target == 'record': out = json.dumps(changed(json.loads(content), draw)).encode()
            elif content[0] % 3 == 0: # the last cell of the CSV file, or its choices
                lines = content[1:].decode().splitlines()
                n = draw.randrange(len(lines))
                lines[n] = lines[n].replace(draw.choice(['a', 'b', ',', '"', '0', '1', 'q']), str(draw.choice(ODD)), 1)
                out = content[:1] + '\n'.join(lines).encode()
            elif content[0] % 3 == 1:
                lines = content[1:].decode().splitlines()
                n = draw.randrange(len(lines))
                lines[n] = json.dumps(changed(json.loads(lines[n]), draw))
                out = content[:1] + '\n'.join(lines).encode()
            else: # Arrow's own types, through a file that is whole
                rows = changed(pq.read_table(io.BytesIO(content[1:])).to_pylist(), draw)
                sink = io.BytesIO()
                pq.write_table(pa.Table.from_pylist(rows), sink, compression='none')
                out = content[:1] + sink.getvalue()
            return out[:most] if len(out) <= most else content
        except Exception: return atheris.Mutate(content, most)
    return mutator


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--target', choices=list(TARGETS), required=True)
    parser.add_argument('--seconds', type=int, default=600)
    parser.add_argument('--out', type=Path)
    parser.add_argument('--escapes', type=Path, help='folder for inputs that escaped')
    args = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix='fuzz-', dir='/dev/shm' if os.path.isdir('/dev/shm') else None))
    corpus, here = scratch / 'corpus', scratch / 'input.json'
    corpus.mkdir()
    for n, seed in enumerate(seeds(args.target)): (corpus / f'seed-{n}').write_bytes(seed)
    state, begun, check = dict(runs=0, escapes={}, inputs=0), time.monotonic(), TARGETS[args.target]

    def report():
        result = dict(target=args.target, seconds=round(time.monotonic() - begun, 1), runs=state['runs'], escapes=len(state['escapes']),
                      corpus_size=len(list(corpus.iterdir())), kinds=sorted(state['escapes']), command=shlex.join(['python', 'tests/fuzz.py', *sys.argv[1:]]))
        text = json.dumps(result, indent=1)
        if args.out: args.out.write_text(text + '\n')
        print(text, flush=True)

    def one(content):
        state['runs'] += 1
        try: check(content, here)
        except Exception as e:
            at = e.__traceback__
            while at.tb_next: at = at.tb_next
            kind = f'{type(e).__name__} at {Path(at.tb_frame.f_code.co_filename).name}:{at.tb_lineno}'
            if kind not in state['escapes']:
                state['escapes'][kind] = str(e)[:300]
                print(f'ESCAPE {kind}: {str(e)[:300]!r} {content[:200]!r}', flush=True)
                if args.escapes:
                    args.escapes.mkdir(parents=True, exist_ok=True)
                    (args.escapes / re.sub(r'\W+', '-', f'{args.target}-{kind}')).write_bytes(content)
        if time.monotonic() - begun >= args.seconds:
            report()
            sys.stdout.flush()
            shutil.rmtree(scratch)
            os._exit(bool(state['escapes']))

    atheris.Setup([sys.argv[0], str(corpus), '-max_len=8192', '-rss_limit_mb=4096', '-timeout=60', '-print_final_stats=0', f'-artifact_prefix={scratch}/'], one, custom_mutator=mutate(args.target))
    atheris.Fuzz()


if __name__ == '__main__': main()
