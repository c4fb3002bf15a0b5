"One run in two processes, as a launcher starts them: through papermill, on this machine's CPU"
import os
import subprocess
import sys
import time

import pandas as pd
import psutil
import pytest
from safetensors.torch import load_file, save_file
from sharing import losses, state_of, with_state

from medpeft_study.records import read_record

TOY = dict(backbone='toy-llama', device='cpu', rank=8, target_rank=2, train_rows=65, val_rows=12, eval_rows=12, test_rows=0, max_length=128, dropout=0., lr=2e-2, micro_batch_size=4)
TWO = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', '-m']
ONE = [sys.executable, '-m']


def started(root, reports, how, **params):
    "The process of a run"
    words = [w for k, v in (TOY | params).items() for w in ('-p', k, str(v))]
    return subprocess.Popen([*how, 'papermill', 'nbs/run.ipynb', *words], cwd=root, env=os.environ | dict(MEDPEFT_REPORTS=str(reports), MEDPEFT_CHECKPOINT_SECONDS='0', OMP_NUM_THREADS='1', TMPDIR=str(reports.parent)),
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def made(root, reports, how, **params):
    "(record, predictions, what was printed) of a run"
    process = started(root, reports, how, **params)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    (path,) = (reports / 'local' / 'records').glob('*.json')
    return read_record(path), pd.read_parquet(reports / 'local' / 'predictions' / f'{path.stem}.parquet'), said


@pytest.fixture(scope='module', params=['qlora', 'adalora'])
def pair(root, tmp_path_factory, request):
    "A folder, and in it what one process makes and what two make; the last step has one row, so one of the two has none"
    folder = tmp_path_factory.mktemp(request.param)
    return folder, *(made(root, folder / name, how, method=request.param) for name, how in (('one', ONE), ('two', TWO)))


def test_two_processes_make_the_run_that_one_makes(pair):
    folder, (one, ones, _), (two, twos, said) = pair
    for key in ('task_loss', 'penalty', 'reported_loss'): assert [h[key] for h in two['history']] == pytest.approx([h[key] for h in one['history']], abs=1e-5)
    for key in ('tokens', 'input_tokens', 'total_rank'): assert [h[key] for h in two['history']] == [h[key] for h in one['history']]
    assert two['ranks'] == one['ranks'] and two['run_id'] == one['run_id'] and two['config'] == one['config']
    assert twos.nll.to_numpy() == pytest.approx(ones.nll.to_numpy(), abs=1e-4)
    assert two['resources']['processes'] == 2 and 'processes' not in one['resources']
    assert 'history' in one['determinism']['equal'] and 'history' not in two['determinism']['equal']
    assert said.count('validation loss') == 1 # the other process is silent
    assert not list(folder.glob('medpeft-process-*')) # nor has it left anything


def test_a_base_that_two_processes_share_makes_the_same_run(root, pair):
    folder, (one, ones, _), _ = pair
    shared, predictions, _ = made(root, folder / 'shared', TWO, method=one['config']['method'], base_storage='sharded')
    for key in ('task_loss', 'penalty', 'reported_loss'): assert [h[key] for h in shared['history']] == pytest.approx([h[key] for h in one['history']], abs=1e-5)
    assert shared['ranks'] == one['ranks'] and shared['config'] == one['config'] | dict(base_storage='sharded')
    assert predictions.nll.to_numpy() == pytest.approx(ones.nll.to_numpy(), abs=1e-4)


def test_a_state_is_of_any_number_of_processes_that_share_the_base(root, tmp_path):
    one = with_state('adalora')
    save_file(one, tmp_path / 'one.safetensors')
    done = subprocess.run([*TWO[:-1], 'tests/sharing.py', tmp_path], cwd=root, env=os.environ | dict(OMP_NUM_THREADS='1'), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    two = load_file(tmp_path / 'two.safetensors')
    assert {k: v.shape for k, v in two.items() if k not in ('on', 'prompt')} == {k: v.shape for k, v in one.items()} # whole
    for found in (two['losses'], two['on'], losses('adalora', state=state_of(two))): assert found.tolist() == pytest.approx(one['losses'].tolist(), abs=1e-5)
    assert two['prompt'].tolist() == pytest.approx(losses('prompt').tolist(), abs=1e-5)
    for k in ('adamw.exp_avg', 'adamw.exp_avg_sq', 'average', 'uncertainty'): assert (two[f'state.{k}'] - one[f'state.{k}']).abs().max() < 1e-5 * one[f'state.{k}'].abs().max()


def test_what_is_complete_is_not_made_again(root, pair):
    again = started(root, pair[0] / 'two', TWO, method=pair[1][0]['config']['method'])
    said = again.communicate(timeout=120)[0]
    assert again.returncode == 0 and said.count('complete') == 1, said


def test_a_run_that_was_killed_goes_on(root, tmp_path):
    whole, _, _ = made(root, tmp_path / 'whole', TWO, method='adalora', epochs=3, dropout=.1)
    reports, end = tmp_path / 'killed', time.monotonic() + 120
    process = started(root, reports, TWO, method='adalora', epochs=3, dropout=.1)
    while time.monotonic() < end and not list(reports.glob('runs/state/*/*.safetensors')): time.sleep(.05)
    for p in [*psutil.Process(process.pid).children(recursive=True), process]: p.kill() # the kernels too
    process.communicate()
    after, _, said = made(root, reports, TWO, method='adalora', epochs=3, dropout=.1)
    assert 'Goes on after step' in said
    assert [h['task_loss'] for h in after['history']] == pytest.approx([h['task_loss'] for h in whole['history']], abs=1e-6)
    assert after['ranks'] == whole['ranks'] and after['resources']['processes'] == 2


def test_what_cannot_be_run_stops_both(root, tmp_path):
    bad = started(root, tmp_path / 'bad', TWO, method='qlora', rank=0)
    assert 'rank = 0' in bad.communicate(timeout=120)[0] and bad.returncode != 0
