"""Runs that are killed at random moments and started again, against runs that are not.

Each start is a process of its own that executes the cells of nbs/run.ipynb; it is forked, since importing takes longer than the toy's
run. A kill is SIGKILL at a random time, or exactly before, inside or after the moment at which a file is moved into place (a checkpoint, the
evaluation before, the figure, the predictions, the record); or ctrl-C; or a power cut, after which the newest checkpoint has lost its end.
A few more go through papermill, whose kernel is a second process. `python tests/torture.py --kills 25 --papermill 2 --out found.json`
"""
import argparse
import contextlib
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ['OMP_NUM_THREADS'] = '1' # before torch; its thread pool would not survive a fork either
os.environ['MEDPEFT_CHECKPOINT_SECONDS'] = '0' # as often as 3 % of the time allows
os.environ.setdefault('HF_HUB_OFFLINE', '1')

import nbformat

import medpeft_study.evaluation, medpeft_study.frames, medpeft_study.reporting, medpeft_study.training, peft, IPython.display, pandas.plotting, matplotlib.pyplot # noqa: E401,F401 - what children need
from medpeft_study.config import project_root
from medpeft_study.records import read_record
from medpeft_study.study import papermill_args, run_name

TOY = dict(backbone='toy-llama', device='cpu', rank=8, target_rank=2, train_rows=192, eval_rows=12, micro_batch_size=4, dropout=.1, lr=2e-2, max_length=128)
CELLS = [c.source for c in nbformat.read(project_root() / 'nbs' / 'run.ipynb', 4).cells if c.cell_type == 'code']


def execute(params: dict, reports: Path, die=None):
    "What papermill does, without a kernel: never returns; exit status 0 if the run is complete"
    os.environ['MEDPEFT_REPORTS'] = str(reports)
    status = 1
    try:
        with open(reports / 'printed.txt', 'a') as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            if die: deadly(*die)
            namespace = dict(__name__='__main__')
            for source in CELLS:
                if 'recorder.finish' in source:
                    values = b''.join(p.detach().numpy().tobytes() for p in namespace['model'].parameters() if p.requires_grad)
                    (reports / 'adapter.bin').write_bytes(values)
                exec(source, namespace)
                if 'profile: str' in source: namespace.update(params)
                if 'recorder.watch' in source: recorder = namespace['recorder']
        status = 0
    except KeyboardInterrupt as e: recorder.fail(e); status = 130
    except BaseException:
        import traceback
        (reports / 'error.txt').write_text(traceback.format_exc())
    finally: os._exit(status)


def deadly(file: str, count: int, how: str):
    "Die when a file of that name is moved into place for the n-th time: before it, with half of it written, or after it"
    move, left = os.replace, [count]
    def replace(source, target):
        left[0] -= file in str(target)
        if not left[0]:
            if how == 'half': os.truncate(source, os.path.getsize(source) // 2)
            if how == 'after': move(source, target)
            os.kill(os.getpid(), signal.SIGKILL)
        move(source, target)
    os.replace = replace


def start(params, reports, die=None) -> int: # process id
    reports.mkdir(parents=True, exist_ok=True)
    if not (pid := os.fork()): execute(params, reports, die)
    return pid


def end(pid) -> int: return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def comparable(reports: Path, params: dict) -> dict:
    "What must be equal: everything but times, memory and where the run was taken up"
    id, base = run_name(params), reports / 'local'
    record = read_record(base / 'records' / f'{id}.json')
    assert record['status'] == 'complete', record
    resources = record.pop('resources')
    del record['provenance']
    return dict(record, used=resources['used'], device=resources['device'], predictions=(base / 'predictions' / f'{id}.parquet').read_bytes(),
                figure=(reports / 'runs' / f'{id}.png').read_bytes(), adapter=(reports / 'adapter.bin').read_bytes() if (reports / 'adapter.bin').exists() else b'')


def left_over(reports: Path) -> list: # of what should be gone
    return [str(p) for p in reports.rglob('*') if p.is_file() and (p.name.startswith('.') or 'state' in p.parts)]


def differences(one: dict, two: dict) -> list: return [k for k in one if one[k] != two.get(k)]


def shot(rng, seconds, kind) -> tuple: # (arguments of `deadly` or None, when to signal)
    if kind not in ('before', 'half', 'after'): return None, rng.uniform(0, seconds)
    return (*rng.choice([('.safetensors', n) for n in (1, 2, 3)] + [(name, 1) for name in ('evaluation before', '.png', '.parquet', '/records/')]), kind), None


def attempt(params, reports, die, when, number) -> int: # exit status
    pid = start(params, reports, die)
    if when is not None:
        time.sleep(when)
        with contextlib.suppress(ProcessLookupError): os.kill(pid, number)
    return end(pid)


KINDS = ('time', 'before', 'time', 'half', 'power cut', 'time', 'after', 'ctrl-C')


def torture(method: str, kills: int, rng: random.Random, folder: Path, say=print) -> dict:
    "Kill a run of a method so many times, each in a folder of its own"
    params = dict(TOY, method=method)
    whole = folder / method / 'whole'
    begin = time.monotonic()
    assert end(start(params, whole)) == 0, (whole / 'error.txt').read_text()
    seconds, expected = time.monotonic() - begin, comparable(whole, params)
    measured = read_record(whole / 'local' / 'records' / f'{run_name(params)}.json')['resources']['seconds']
    equal, landed, taken_up, wrong = 0, 0, 0, []
    for which in range(kills):
        kind, reports = KINDS[which % len(KINDS)], folder / method / str(which)
        for _ in range(5): # a run that was quicker than the shot is no test
            die, when = shot(rng, seconds, kind)
            if status := attempt(params, reports, die, when, signal.SIGINT if kind == 'ctrl-C' else signal.SIGKILL): break
            shutil.rmtree(reports)
        landed += status != 0
        assert whole.exists() and reports.exists(), f'{folder} was removed by someone'
        states = sorted((reports / 'runs' / 'state' / run_name(params)).glob('*.safetensors'))
        if kind == 'power cut' and states: os.truncate(states[-1], rng.randrange(states[-1].stat().st_size))
        record = reports / 'local' / 'records' / f'{run_name(params)}.json'
        status = 0 if record.exists() and read_record(record)['status'] == 'complete' else end(start(params, reports))
        if status == 0 and record.exists(): # state left by a kill after the record goes at the next start, which says that the run is complete
            if left_over(reports): end(start(params, reports))
            found = differences(expected, comparable(reports, params)) + left_over(reports)
            taken_up += 'taken_up' in read_record(record)['provenance']
        else: found = [f'exit status {status}', (reports / 'error.txt').read_text() if (reports / 'error.txt').exists() else '']
        equal += not found
        if found: wrong.append(dict(which=which, kind=kind, die=die, when=when, found=[str(f)[-2000:] for f in found]))
        say(f'{method} {which + 1:>2}/{kills} {kind:<9} {" ".join(map(str, die[:2])) if die else f"{when:.2f} s":<22} {"equal" if not found else found}', flush=True)
        if not found: shutil.rmtree(reports)
    return dict(method=method, kills=kills, equal=equal, landed=landed, taken_up=taken_up, wrong=wrong, seconds_whole=round(seconds, 2), seconds=measured,
                checkpoint_share=measured.get('checkpoints', 0.) / measured['training'])


def through_papermill(method: str, kills: int, rng: random.Random, folder: Path, say=print) -> dict:
    "The same with the user's command: papermill is killed, and with it, a moment later, its kernel"
    params, equal, wrong, landed = dict(TOY, method=method), 0, [], 0
    command = [str(Path(sys.executable).parent / 'papermill'), *papermill_args(params)[1:]]
    def run(reports): return subprocess.Popen(command, cwd=project_root(), env=os.environ | dict(MEDPEFT_REPORTS=str(reports)), stdin=subprocess.DEVNULL,
                                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    expected = comparable(folder / method / 'whole', params)
    for which in range(kills):
        reports = folder / method / f'papermill-{which}'
        child = run(reports)
        steps, aim = 0, rng.randint(1, 11) # lines of steps to wait for
        for line in child.stdout:
            steps += line.startswith('step ')
            if steps >= aim: break
        time.sleep(rng.uniform(0, .3))
        child.kill()
        child.communicate()
        landed += child.returncode != 0
        again = run(reports) # at once, while the kernel may still be there
        out, err = again.communicate(timeout=300)
        found = [err[-2000:]] if again.returncode else [f for f in differences(expected, comparable(reports, params)) if f != 'adapter'] + left_over(reports)
        equal += not found
        if found: wrong.append(dict(which=which, found=found))
        say(f'{method} papermill {which + 1}/{kills} {"equal" if not found else found} {[l for l in out.splitlines() if l.startswith("Goes on")]}', flush=True)
    return dict(method=method, kills=kills, equal=equal, landed=landed, wrong=wrong)


def main(kills: int, papermill: int = 0, seed: int = 0, out=None, say=print) -> dict:
    "Both methods"
    begin, rng = time.monotonic(), random.Random(seed)
    with tempfile.TemporaryDirectory() as d:
        runs = [torture(m, kills, rng, Path(d), say) for m in ('qlora', 'adalora')]
        with_papermill = [through_papermill(m, papermill, rng, Path(d), say) for m in ('qlora', 'adalora')] if papermill else []
    found = dict(kills=sum(r['kills'] for r in runs + with_papermill), equal=sum(r['equal'] for r in runs + with_papermill), seconds=round(time.monotonic() - begin, 1),
                 command=shlex.join(['python', 'tests/torture.py', '--kills', str(kills), '--papermill', str(papermill), '--seed', str(seed)]),
                 checkpoint_share=max(r['checkpoint_share'] for r in runs), runs=runs, papermill=with_papermill)
    say(f"{found['equal']} of {found['kills']} equal, in {found['seconds']:.0f} s; writing checkpoints took {found['checkpoint_share']:.1%} of the time of training at the most")
    if out: Path(out).write_text(json.dumps(found, indent=1) + '\n')
    return found


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--kills', type=int, default=25, help='a method')
    parser.add_argument('--papermill', type=int, default=2, help='more of them a method, through papermill')
    parser.add_argument('--seed', type=int, default=0, help='of the random moments')
    parser.add_argument('--out', help='where the figures go, as JSON')
    args = parser.parse_args()
    found = main(args.kills, args.papermill, args.seed, args.out)
    sys.exit(found['equal'] != found['kills'])
