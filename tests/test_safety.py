"Nothing from elsewhere is run, nothing secret is written, and text from data stays text"
import json
import os
import re
import subprocess
import sys
import zipfile
from dataclasses import replace
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from unittest.mock import patch

import corpus
import nbformat
import pytest

from medpeft_study import data
from medpeft_study.backbones import BackboneError, load_backbone, load_tokenizer, resolve_backbone
from medpeft_study.config import ConfigError, make_config, theme_table
from medpeft_study.data import DATASETS, DataError
from medpeft_study.explorer_data import write_explorer
from medpeft_study.frames import load_predictions, load_records
from medpeft_study.records import read_record
from medpeft_study.study import run_name
from medpeft_study.tables import FORMATS, build_tables

TOKEN = 'hf_' + 'planted' * 5
SECRET = 'correct-horse-battery-staple'
TOY = dict(backbone='toy-llama', device='cpu', rank=4, target_rank=2, max_steps=3, train_rows=48, val_rows=8, test_rows=4, eval_rows=4)


# --- tokens

@pytest.fixture
def planted(tmp_path, root, monkeypatch):
    "A project whose git remote holds a token, and an environment that holds two more"
    for name in ('HF_TOKEN', 'HUGGING_FACE_HUB_TOKEN', 'GITHUB_TOKEN'): monkeypatch.setenv(name, TOKEN)
    monkeypatch.setenv('TRACKER_API_KEY', SECRET)
    project = tmp_path / 'project'
    (project / 'nbs').mkdir(parents=True)
    (project / 'settings.ini').write_text((root / 'settings.ini').read_text())
    (project / 'nbs' / 'run.ipynb').write_text((root / 'nbs' / 'run.ipynb').read_text())
    for words in (['init', '-q'], ['add', '-A'], ['-c', 'user.name=a', '-c', 'user.email=a@b.invalid', 'commit', '-qm', 'x'], ['remote', 'add', 'origin', f'https://me:{TOKEN}@host.invalid/x.git']):
        subprocess.run(['git', *words], cwd=project, check=True)
    return project


def papermill(project, **params):
    words = [w for k, v in params.items() for w in ('-p', k, str(v))]
    return subprocess.run([sys.executable, '-m', 'papermill', 'nbs/run.ipynb', *words], cwd=project, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300)


def written(project): return {p.relative_to(project): p.read_bytes() for p in project.rglob('*') if p.is_file() and '.git' not in p.parts}


def test_a_planted_token_reaches_no_record_log_prediction_or_notebook(planted):
    done = papermill(planted, **TOY)
    assert done.returncode == 0, done.stderr[-2000:]
    kinds = {p.suffix for p in written(planted)}
    assert {'.json', '.parquet', '.ipynb', '.png'} <= kinds
    for name, content in {'stdout': done.stdout.encode(), 'stderr': done.stderr.encode(), **written(planted)}.items():
        for secret in (TOKEN, SECRET): assert secret.encode() not in content, name
    assert load_predictions(run_name(TOY), planted / 'reports' / 'local')['item_id'].str.contains(TOKEN).sum() == 0


def test_a_token_in_an_error_or_a_command_is_taken_out_of_the_record(planted, monkeypatch):
    from medpeft_study.records import Recorder
    monkeypatch.setenv('MEDPEFT_REPORTS', str(planted / 'reports'))
    recorder = Recorder(resolve_backbone(data.resolve_data(make_config(**TOY))), command=f'papermill -p backbone {TOKEN}')
    recorder.fail(RuntimeError(f'401 for https://me:{TOKEN}@hub, key {SECRET}'))
    text = recorder.path.read_text()
    assert TOKEN not in text and SECRET not in text and '[secret]' in read_record(recorder.path)['error']


def test_a_token_given_as_a_parameter_is_refused_and_not_repeated(planted):
    before = written(planted)
    for name in ('backbone', 'dataset_path', 'backbone_revision'):
        with pytest.raises(ConfigError, match='access token') as e: make_config(**{name: f'https://{TOKEN}@x'})
        assert TOKEN not in str(e.value)
    done = papermill(planted, backbone=TOKEN)
    assert done.returncode == 2 and TOKEN not in done.stdout + done.stderr and written(planted) == before


# --- code

class Planted:
    "Writes a file when it is unpickled"
    def __init__(self, path): self.path = path
    def __reduce__(self): return (open, (str(self.path), 'w'))


@pytest.mark.parametrize('name', ['pytorch_model.bin', 'model.pt', 'model.ckpt', 'adapter_model.bin'])
def test_pickled_weights_are_refused_and_never_run(tmp_path, name):
    import torch
    folder, mark = corpus.model_folder(tmp_path), tmp_path / 'was-run'
    corpus.pickled(folder, name)
    torch.save(dict(weight=Planted(mark)), folder / name)
    with pytest.raises((ConfigError, BackboneError), match='pickled weights are never loaded'): corpus.load_model(tmp_path)
    assert not mark.exists()
    torch.load(folder / name, weights_only=False)
    assert mark.exists() # it would have run


def test_a_pickle_beside_good_weights_is_not_opened(tmp_path):
    import torch
    folder, mark = corpus.model_folder(tmp_path), tmp_path / 'was-run'
    for name in ('pytorch_model.bin', 'training_args.bin', 'optimizer.pt'): torch.save(dict(weight=Planted(mark)), folder / name)
    corpus.load_model(tmp_path)
    assert not mark.exists()


@pytest.mark.parametrize('kind', ['llama', 'mine'])
def test_code_in_a_model_folder_is_never_run(tmp_path, kind):
    folder, mark = corpus.model_folder(tmp_path), tmp_path / 'was-run'
    (folder / 'mine.py').write_text(f'open({str(mark)!r}, "w")\nclass Config: pass\nclass Model: pass\nclass Tokenizer: pass\n')
    corpus.edit('config.json', model_type=kind, auto_map=dict(AutoConfig='mine.Config', AutoModelForCausalLM='mine.Model'))(folder)
    corpus.edit('tokenizer_config.json', auto_map=dict(AutoTokenizer=['mine.Tokenizer', 'mine.Tokenizer']))(folder)
    if kind == 'mine':
        with pytest.raises(ConfigError, match='never run'): corpus.load_model(tmp_path)
    else: corpus.load_model(tmp_path) # an architecture of transformers' own: its code, not the folder's
    assert not mark.exists()


def test_our_code_asks_for_no_pickle_and_no_remote_code(root):
    for path in (root / 'medpeft_study').glob('*.py'):
        text = path.read_text(encoding='utf-8')
        assert not re.search(r'\bpickle\b(?!d)|trust_remote_code\s*=\s*True|weights_only\s*=\s*False|(?<![.\w])(eval|exec)\(|(broadcast|gather|scatter|send|recv)_object', text), path.name
        for call in re.findall(r'torch\.load\((.*)', text): assert 'weights_only=True' in call, path.name
        for call in re.findall(r'Auto\w+\.from_pretrained\((.*)', text): assert 'trust_remote_code=False' in text, path.name


# --- downloads

def test_an_archive_cannot_leave_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('MEDPEFT_CACHE', str(tmp_path / 'cache'))
    wheel = tmp_path / 'fake-1-py3-none-any.whl'
    with zipfile.ZipFile(wheel, 'w') as z:
        for name in ('../../../evil.txt', '/evil.txt', 'fake/a.txt'): z.writestr(name, 'evil')
    monkeypatch.setattr(data, '_download_wheel', lambda package, folder: wheel)
    right = sha256(b'evil').hexdigest()
    for member in ('../../../evil.txt', '/evil.txt', 'fake/a.txt'):
        path = data.package_member('fake==1', member, right) # its hash is right: it may be read, and goes where we say
        assert path.parent == tmp_path / 'cache' / 'downloads' and path.read_text() == 'evil'
        with pytest.raises(DataError, match='sha256'): data.package_member('fake==1', member, '0' * 64)
    assert {p.relative_to(tmp_path).parts[0] for p in tmp_path.rglob('*')} == {'cache', wheel.name}
    assert not Path('/evil.txt').exists() and all(p.name.startswith(right[:8]) for p in (tmp_path / 'cache' / 'downloads').iterdir())


def test_what_is_downloaded_is_pinned():
    from medpeft_study.backbones import BACKBONES
    for spec in BACKBONES.values():
        if spec.source == 'hub': assert re.fullmatch('[0-9a-f]{40}', spec.revision), spec.id
        if spec.source == 'package': assert '==' in spec.id and re.fullmatch('[0-9a-f]{64}', spec.revision)
        for package, _, sha256 in spec.parts: assert '==' in package and re.fullmatch('[0-9a-f]{64}', sha256), package
    assert '==' in data.HPO_PACKAGE and re.fullmatch('[0-9a-f]{64}', data.HPO_SHA256)


# --- text that would be markup

EVIL = '<script>alert(1)</script>'
TRICKS = [EVIL, '<img src=x onerror=alert(1)>', '[x](javascript:alert(1))', 'a | b', '**bold** `code`', '$x^2$ & 5 % #1 \\input{/etc/passwd}', '"><svg onload=alert(1)>', '{{ 7 * 7 }}']


class Tags(HTMLParser):
    "The tags, and the attributes that run"
    def __init__(self, text): super().__init__(); self.found, self.text = set(), []; self.feed(text)
    def handle_starttag(self, tag, attrs): self.found |= {tag, *(k for k, v in attrs if k.startswith('on') or 'javascript:' in (v or ''))}
    def handle_data(self, text): self.text.append(text)


@pytest.fixture(scope='module')
def evil_records(root):
    "Committed records whose domains, backbone and dataset carry tricks"
    records = json.loads(json.dumps([r for r in load_records() if r['config']['seed'] == 0 and r['study'] == 'mini']))
    for r in records:
        names = dict(zip(sorted(r['data']['domains']['train']), TRICKS))
        for split, counts in r['data']['domains'].items(): r['data']['domains'][split] = {names.get(k, k): v for k, v in counts.items()}
        for m in r['metrics']: m['domain'] = names.get(m['domain'], m['domain'])
        r['config'].update(backbone=f'/models/{EVIL.replace("/", "")}', dataset='phenotype-qa')
        r['provenance']['command'] = f'papermill nbs/run.ipynb -p backbone {EVIL}'
    return records


def test_tables_hold_tricks_as_text(evil_records):
    tables = build_tables(evil_records)
    marked = 0
    for table in tables:
        texts = {ending: write(table) for ending, write in FORMATS.items()}
        html = Tags(texts['html'])
        assert not html.found & {'script', 'img', 'svg', 'onerror', 'onload', 'href'}, table.name
        body = texts['md']
        assert not re.search(r'<(script|img|svg)', body) and '](javascript' not in body, table.name
        assert not re.search(r'(?<!\\)[$#%&](?![\\a-z]*\$)', re.sub(r'\$[^$]*\$|\\[a-z]+(\[[^]]*\])?\{[^}]*\}|(?<!\\)&|%\n|#1', '', texts['tex'].split(r'\midrule')[1].split(r'\bottomrule')[0])), table.name
        assert r'\input{' not in texts['tex'], table.name
        marked += '&lt;script' in texts['html']
    assert marked # the trick was there to be escaped


def test_markdown_of_a_run_holds_tricks_as_text():
    for trick in (EVIL, 'a | b', '`code`'):
        line = next(l for l in theme_table(replace(make_config(), dataset_path=trick)).splitlines() if l.startswith('| data'))
        assert '<script' not in line and line.count(' | ') == 1
    items = data.make_items({trick: [dict(question=EVIL, choices=[EVIL, 'b'], answer=0)] for trick in TRICKS})
    table = data.baseline_table(items)
    assert '<' not in table and '](javascript' not in table and table.count('\n') == len(TRICKS) + 2
    assert all(len(re.findall(r'(?<!\\)\|', line)) == 9 for line in table.splitlines())


def test_a_run_on_a_dataset_of_tricks_shows_them_as_text(tmp_path, root):
    "Through papermill and nbconvert: ids, questions, choices"
    (tmp_path / 'data').mkdir()
    rows = [dict(item_id=f'{EVIL} {n}', question=f'{TRICKS[n % len(TRICKS)]} number {n}?', choices=[f'{EVIL} {n}', TRICKS[1], '|'], answer=n % 3) for n in range(3)]
    for name in DATASETS['medical-textbook-qa'].configs: (tmp_path / 'data' / f'{name}.jsonl').write_text(corpus.jsonl([dict(r, item_id=f'{name} {r["item_id"]}') for r in rows]))
    params = dict(TOY, profile='paper', dataset_path=str(tmp_path / 'data'), train_rows=16, val_rows=8, test_rows=4, batch_size=4, micro_batch_size=2)
    words = [w for k, v in params.items() for w in ('-p', k, str(v))]
    done = subprocess.run([sys.executable, '-m', 'papermill', 'nbs/run.ipynb', *words], cwd=root, env=os.environ | dict(MEDPEFT_REPORTS=str(tmp_path / 'reports')), capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    [path] = (tmp_path / 'reports' / 'runs').glob('*.ipynb')
    shown = 0
    for cell in nbformat.read(path, 4).cells:
        for out in cell.get('outputs', []):
            if html := out.get('data', {}).get('text/html'):
                assert not Tags(html).found & {'script', 'img', 'svg', 'onerror', 'onload'}
                shown += '&lt;script&gt;' in html
    assert shown
    from nbconvert import HTMLExporter
    page, _ = HTMLExporter().from_filename(str(path))
    assert 'alert(1)' in page and not re.search(r'<script>alert|<img src=x|<svg onload', page)


def test_the_explorer_holds_tricks_as_text(tmp_path, evil_records, root):
    "Its data is a script that only assigns; the page makes text nodes of it"
    from medpeft_study import explorer_data
    base = tmp_path / 'reports'
    (base / 'records').mkdir(parents=True)
    for r in evil_records: (base / 'records' / f"{r['run_id']}.json").write_text(json.dumps(r))
    with patch.object(explorer_data, 'load_records', lambda base, also: evil_records): write_explorer(tmp_path / 'page', base)
    text = (tmp_path / 'page' / 'runs.js').read_text()
    assert '<' not in text and 'script>alert(1)' in text
    assert json.loads(text.removeprefix('window.RUNS = ').removesuffix(';\n'))['runs']
    assert not re.search(r'innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(', (root / 'nbs' / 'assets' / 'explorer.js').read_text())
