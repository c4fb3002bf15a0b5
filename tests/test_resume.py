"A run that is cut short and started again ends like one that was not; one that goes wrong stops and says where"
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import nbformat
import pytest
import torch
from jupyter_client.manager import start_new_kernel

from medpeft_study.checkpoints import BusyError, Checkpoints, hold, let_go
from medpeft_study.records import Recorder, read_record
from medpeft_study.study import run_config, run_name
from medpeft_study.training import Stepper, TrainingError, train, train_within_memory

TOY = dict(backbone='toy-llama', device='cpu', rank=8, target_rank=2, train_rows=160, eval_rows=12, micro_batch_size=4, dropout=.1, lr=2e-2, max_length=128)
METHODS = pytest.mark.parametrize('method', ['qlora', 'adalora'])
flat_values = lambda model: torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


class Cut(Exception): pass


class Cutting(Checkpoints):
    "A checkpoint after every step, and the end after one of them"
    def __init__(self, folder, last=None): super().__init__(folder, dict(run_id='toy'), seconds=0); self.stop = last
    def __call__(self, step, take, nbytes):
        self.write(step, take)
        if step == self.stop: raise Cut


@pytest.fixture
def going(toy_config, toy_rows, toy_model, tmp_path):
    "Method -> (a function that trains up to a step, or to the end, from what is on the disk; how a run ends that was never cut)"
    def make(method, **changes):
        cfg = toy_config(method, dropout=.1, **changes)
        def go(last=None):
            model, checkpoints = toy_model(cfg), Cutting(tmp_path, last)
            state = checkpoints.latest()
            if state: torch.rand(7) # what happens before training may draw as it likes
            try: history, used = train_within_memory(model, toy_rows, cfg, 259, None, state, checkpoints)
            except Cut: return None
            return history, used, flat_values(model), model.peft_config['default'].rank_pattern if method == 'adalora' else None
        whole = go()
        for path in tmp_path.iterdir(): path.unlink()
        return go, whole
    return make


def equal(one, two): return one[:2] == two[:2] and torch.equal(one[2], two[2]) and one[3] == two[3]


@METHODS
def test_a_run_that_is_cut_again_and_again_ends_the_same(method, going):
    go, whole = going(method)
    for last in (1, 2, 6, 9): assert go(last) is None
    assert equal(go(), whole)


@METHODS
def test_a_damaged_checkpoint_is_told_and_the_one_before_is_used(method, going, tmp_path, capsys):
    go, whole = going(method)
    go(7)
    os.truncate(sorted(tmp_path.iterdir())[-1], 1000)
    assert equal(go(), whole)
    printed = capsys.readouterr().out
    assert 'is damaged' in printed and 'Goes on after step 6 of 10.' in printed
    for path in tmp_path.iterdir(): path.write_bytes(b'x' * 100)
    assert equal(go(), whole) and 'begins at the beginning' in capsys.readouterr().out


@METHODS
def test_a_run_that_ran_short_of_memory_goes_on_with_what_it_used(method, going):
    accumulate = Stepper.accumulate
    def short(self, size):
        if self.step >= 3 and self.cfg.micro_batch_size > 2: raise torch.OutOfMemoryError('CUDA out of memory.')
        accumulate(self, size)
    with mock.patch.object(Stepper, 'accumulate', short):
        go, whole = going(method, micro_batch_size=4)
        go(2) # with passes of four rows, which will not do
        assert equal(go(), whole) and whole[1].micro_batch_size == 2
    go, whole = going(method, micro_batch_size=2)
    with mock.patch.object(Stepper, 'accumulate', short): go(5)
    assert equal(go(), whole)


def test_a_full_disk_costs_a_checkpoint_not_the_run(going, tmp_path, capsys):
    go, whole = going('adalora')
    go(4)
    kept = sorted(p.name for p in tmp_path.iterdir())
    with mock.patch('os.replace', side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))): assert equal(go(), whole)
    assert sorted(p.name for p in tmp_path.iterdir()) == kept
    assert capsys.readouterr().out.count('No space left on device') == 1


FULL = """
import torch
from medpeft_study.checkpoints import Checkpoints
run = Checkpoints('/mnt/state', {}, seconds=0)
for step, size in ((1, 1000), (2, 100_000)): run.write(step, lambda: dict(step=torch.tensor([step]), values=torch.ones(size)))
assert Checkpoints('/mnt/state', {}).latest()['step'] == 1
assert [p.name for p in run.folder.iterdir()] == ['000001.safetensors']
"""


def test_on_a_disk_that_is_really_full(root):
    "A memory disk of 128 KiB, in a mount namespace of its own"
    shell = ['unshare', '--mount', 'sh', '-c', 'mount -t tmpfs -o size=128k tmpfs /mnt && exec "$@"', 'sh']
    if not shutil.which('unshare') or subprocess.run([*shell, 'true'], capture_output=True).returncode: pytest.skip('No file system can be mounted here.')
    done = subprocess.run([*shell, sys.executable, '-c', FULL], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'No checkpoint after step 2' in done.stdout and done.stdout.count('\n') == 1


@METHODS
def test_a_poisoned_weight_stops_the_run_at_its_step_and_names_the_rows(method, toy_config, toy_rows, toy_model, tmp_path, monkeypatch):
    monkeypatch.setenv('MEDPEFT_REPORTS', str(tmp_path / 'reports'))
    cfg, checkpoints = toy_config(method), Cutting(tmp_path / 'state')
    model = toy_model(cfg)
    def poison(entry):
        if entry['step'] == 4: next(p for p in model.parameters() if p.requires_grad).data[0, 0] = float('nan')
    with pytest.raises(TrainingError, match='is nan at step 5') as e: train(model, toy_rows, cfg, 259, poison, keep=checkpoints)
    assert len(e.value.item_ids) == 16 and set(e.value.item_ids) <= {r.item_id for r in toy_rows}
    recorder = Recorder(cfg)
    recorder.fail(e.value)
    record = read_record(recorder.path)
    assert record['error_items'] == e.value.item_ids and 'step 5' in record['error']
    assert checkpoints.latest()['step'] == 4


def test_a_loss_that_is_too_good_is_said_once(toy_config, toy_rows, toy_model, capsys):
    cfg = toy_config('qlora', max_steps=4)
    with mock.patch('medpeft_study.training.task_loss', lambda model, p, longest: sum(x.sum() for x in model.parameters() if x.requires_grad) * 0):
        train(toy_model(cfg), toy_rows, cfg, 259)
    assert capsys.readouterr().out.count('look for answers in the prompts, or padding in the labels') == 1


def papermill(reports, **env):
    words = [w for k, v in dict(TOY, method='qlora').items() for w in ('-p', k, str(v))]
    return subprocess.Popen([str(Path(sys.executable).parent / 'papermill'), 'nbs/run.ipynb', *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env=os.environ | dict(MEDPEFT_REPORTS=str(reports)) | env)


def test_of_two_that_race_for_a_run_one_makes_it_and_one_says_so(root, tmp_path, monkeypatch):
    "A third waits, and then finds it made"
    monkeypatch.chdir(root)
    runs = [papermill(tmp_path) for _ in range(2)] + [papermill(tmp_path, MEDPEFT_WAIT='1')]
    (out, err), (out2, err2), (waited, err3) = (run.communicate(timeout=300) for run in runs)
    codes = [run.returncode for run in runs]
    assert codes[2] == 0 and sorted(codes[:2]) in ([0, 2], [2, 2]), (codes, err, err2, err3) # where the patient one came first, two are refused
    for code, said in zip(codes, (err, err2)):
        if code: assert said.startswith('Error: qlora-toy-llama-') and 'is being made by process' in said and said.count('\n') == 1, said
    id = run_name(dict(TOY, method='qlora'))
    assert read_record(tmp_path / 'local' / 'records' / f'{id}.json')['status'] == 'complete'
    assert not list((tmp_path / 'runs').glob('state/*')) and not list(tmp_path.rglob('.*'))


def test_a_run_is_not_begun_beside_another_process(tmp_path, monkeypatch):
    monkeypatch.setenv('MEDPEFT_REPORTS', str(tmp_path))
    cfg = run_config(dict(TOY, method='qlora'))
    recorder = Recorder(cfg)
    code = f'from medpeft_study.records import Recorder; from medpeft_study.study import run_config; Recorder(run_config({dict(TOY, method="qlora")!r}))'
    refused = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert refused.returncode == 1 and f'is being made by process {os.getpid()} on ' in refused.stderr
    recorder.fail(RuntimeError('gone')) # lets go
    assert subprocess.run([sys.executable, '-c', code], capture_output=True).returncode == 0


def test_the_stop_button_of_jupyterlab(root, tmp_path, monkeypatch):
    "The notebook in a kernel, interrupted while it trains, then run again from the top in the same kernel"
    monkeypatch.chdir(root)
    params = dict(TOY, method='adalora', probes='order')
    cells = [c.source for c in nbformat.read('nbs/run.ipynb', 4).cells if c.cell_type == 'code']
    cells[2:2] = ['\n'.join(f'{k} = {v!r}' for k, v in params.items())]
    manager, client = start_new_kernel(env=os.environ | dict(MEDPEFT_REPORTS=str(tmp_path)))
    try:
        def run_all(on_line=lambda line: None):
            for source in cells:
                def output(message):
                    if message['msg_type'] == 'stream': on_line(message['content']['text']); shown.append(message['content']['text'])
                reply = client.execute_interactive(source, output_hook=output, timeout=120)['content']
                if reply['status'] == 'error': return reply['ename']
        shown = []
        assert run_all(lambda line: manager.interrupt_kernel() if 'step    3/' in line else None) == 'KeyboardInterrupt'
        path = tmp_path / 'local' / 'records' / f'{run_name(params)}.json'
        record = read_record(path)
        assert record['status'] == 'failed' and record['error'].startswith('KeyboardInterrupt: stopped after step')
        shown.clear()
        client.execute_interactive("from medpeft_study.probes import PROBES; asked = PROBES['order']; PROBES['order'] = lambda *args: asked(*args) if args[-1] == 'after' else 1 / 0") # what was asked before training is on the disk
        assert run_all() is None, shown
        assert 'Goes on after step' in ''.join(shown)
        record = read_record(path)
        assert record['status'] == 'complete' and len(record['history']) == 10 and len(record['provenance']['taken_up']) == 1
        assert {m['when'] for m in record['metrics'] if m['metric'] == 'circular_accuracy'} == {'before', 'after'}
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def test_ten_kills(tmp_path, root):
    "A short version of `make torture`, in a process that has not computed yet"
    out = tmp_path / 'found.json'
    done = subprocess.run([sys.executable, 'tests/torture.py', '--kills', '5', '--papermill', '0', '--seed', '1', '--out', str(out)], cwd=root, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and '10 of 10 equal' in done.stdout, done.stdout + done.stderr
