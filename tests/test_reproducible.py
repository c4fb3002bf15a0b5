"The same command twice on the CPU: equal bytes of the adapter, equal numbers; and what was kept is handed on by `medpeft export`"
import hashlib
import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pandas as pd
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from medpeft_study.backbones import load_backbone
from medpeft_study.config import RunConfig
from medpeft_study.records import read_record
from medpeft_study.saving import CONFIG, WEIGHTS, config_here, load_adapter
from medpeft_study.cli import app
from medpeft_study.study import run_name

TOY = dict(backbone='toy-llama', device='cpu', rank=8, target_rank=2, max_steps=3, eval_rows=8, lr=2e-2, save_adapter=True) # with the dropout of the paper


def papermill(root, reports, **params):
    "The user's command, with its files in a folder of the test; two threads, so that sums are split, that do not fight for a busy machine"
    env = os.environ | dict(MEDPEFT_REPORTS=str(reports), OMP_NUM_THREADS='2', OMP_WAIT_POLICY='PASSIVE', PYTHONHASHSEED='random')
    words = [w for k, v in params.items() for w in ('-p', k, str(v))]
    return subprocess.run([str(Path(sys.executable).parent / 'papermill'), 'nbs/run.ipynb', *words], cwd=root, env=env, capture_output=True, text=True,
                          stdin=subprocess.DEVNULL, timeout=600)


@pytest.fixture
def export(twice, monkeypatch):
    "`medpeft export` on the files of one of the runs"
    def call(folder, *words):
        monkeypatch.setenv('MEDPEFT_REPORTS', str(folder))
        return CliRunner().invoke(app, ['export', *map(str, words)])
    return call


@pytest.fixture(scope='module', params=['qlora', 'adalora'])
def twice(request, root, tmp_path_factory):
    "A run of each method, in two folders and four processes: (run's id, first, second)"
    params, folders = dict(TOY, method=request.param), [tmp_path_factory.mktemp(n) for n in ('first', 'second')]
    for folder in folders:
        done = papermill(root, folder, **params)
        assert done.returncode == 0, done.stderr[-3000:]
    return run_name(params), *folders


def record(folder, id): return read_record(folder / 'local' / 'records' / f'{id}.json')


def test_the_adapter_is_the_same_bytes(twice):
    id, *folders = twice
    first, second = ({p.name: p.read_bytes() for p in (f / 'runs' / id / 'adapter').iterdir()} for f in folders)
    assert {WEIGHTS, CONFIG} <= set(first) and first == second


def test_the_record_says_the_same_but_for_time_and_memory(twice):
    id, *folders = twice
    records = [record(f, id) for f in folders]
    for r in records:
        r['resources'] = {k: r['resources'][k] for k in ('device', 'used')}
        for name in ('started', 'finished', 'commit', 'dirty'): del r['provenance'][name] # someone may be at work in this clone
    assert records[0] == records[1]
    said = records[0]['determinism']
    assert said['device'] == 'cpu' and said['threads'] == 2 and said['equal'] == ['adapter', 'history', 'metrics', 'predictions'] and not said['unmeasured']


def test_every_prediction_is_the_same(twice):
    id, *folders = twice
    first, second = (pd.read_parquet(f / 'local' / 'predictions' / f'{id}.parquet') for f in folders)
    pd.testing.assert_frame_equal(first, second, check_exact=True)


def test_the_record_has_the_hash_of_the_adapter(twice):
    id, folder, _ = twice
    content = (folder / 'runs' / id / 'adapter' / WEIGHTS).read_bytes()
    assert record(folder, id)['model']['adapter'] == dict(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))


@pytest.mark.parametrize('twice', ['adalora'], indirect=True)
def test_a_record_is_made_again_by_its_own_command_and_compared(twice, root, tmp_path):
    id, folder, _ = twice
    env, out = os.environ | dict(MEDPEFT_REPORTS=str(folder), OMP_NUM_THREADS='2', OMP_WAIT_POLICY='PASSIVE'), tmp_path / 'reproduced.json'
    before = sorted(p for p in folder.rglob('*'))
    call = lambda *words: subprocess.run([sys.executable, '-m', 'medpeft_study.again', *words, '--out', str(out)], cwd=root, env=env, capture_output=True, text=True, timeout=600)
    done = call(id)
    assert done.returncode == 0 and f'{id}: within the tolerance' in done.stdout, done.stderr[-3000:]
    found, = json.loads(out.read_text())['points']
    assert not any(found['largest'].values()) and found['training'] == found['ranks'] == 0 and found['device_now'] == found['device_then'] and len(found['metrics']) > 8
    assert sorted(p for p in folder.rglob('*')) == before # nothing of the run itself is touched
    lost = call('no-such-run')
    assert lost.returncode == 2 and lost.stderr.count('\n') == 1 and 'There is no record' in lost.stderr


def test_export_hands_on_the_adapter_and_the_merged_model(twice, export, tmp_path):
    "Both compute what the run's model computed"
    id, folder, _ = twice
    merged = export(folder, id, '--merged', '--to', tmp_path / 'merged', '--dtype', 'float32')
    assert merged.exit_code == 0 and 'AutoModelForCausalLM.from_pretrained' in merged.stdout, merged.stderr
    kept = export(folder, id, '--adapter', '--to', tmp_path / 'adapter')
    assert kept.exit_code == 0, kept.stderr
    cfg = config_here(RunConfig(**record(folder, id)['config']))
    ids = torch.tensor([AutoTokenizer.from_pretrained(tmp_path / 'merged')('An abnormal heart rate.')['input_ids']])
    with torch.no_grad():
        want = load_adapter(folder / 'runs' / id / 'adapter', cfg)(input_ids=ids).logits
        whole = AutoModelForCausalLM.from_pretrained(tmp_path / 'merged', dtype=torch.float32, local_files_only=True).eval()
        assert (whole(input_ids=ids).logits - want).abs().max() < 1e-5
        plain = PeftModel.from_pretrained(load_backbone(cfg)[0], tmp_path / 'adapter').eval()
        assert (plain(input_ids=ids).logits - want).abs().max() < 1e-5
        assert (load_backbone(cfg)[0](input_ids=ids).logits - want).abs().max() > 1e-3 # it was trained


def test_export_refuses_in_one_sentence(twice, export, tmp_path):
    id, _, folder = twice
    def refused(said, *words):
        done = export(folder, *words)
        assert done.exit_code == 2 and said in done.stderr and done.stderr.count('\n') == 1, done.output
    (tmp_path / 'there').mkdir()
    refused('is there already', id, '--adapter', '--to', tmp_path / 'there')
    refused('There is no record', 'no-such-run', '--merged', '--to', tmp_path / 'x')
    weights = folder / 'runs' / id / 'adapter' / WEIGHTS
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    refused('does not hold the adapter', id, '--merged', '--to', tmp_path / 'x')
    path = folder / 'local' / 'records' / f'{id}.json'
    weights.write_bytes(b'')
    (folder / 'runs' / id / 'adapter').rename(folder / 'runs' / id / 'elsewhere')
    refused('was not kept', id, '--merged', '--to', tmp_path / 'x')
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(schema=3)))
    refused('reads up to 2', id, '--merged', '--to', tmp_path / 'x')
    assert [p.name for p in tmp_path.iterdir()] == ['there']


def test_the_lock_is_what_is_installed(root):
    "constraints.txt is what `make install` takes; another environment is not the tested one"
    pins = dict(line.split('==') for line in (root / 'constraints.txt').read_text().splitlines() if not line.startswith('#'))
    stamp = Path(sys.prefix) / '.installed'
    if not stamp.is_file(): pytest.skip('This environment was not made by `make install`.')
    wrong = {}
    for name, pin in pins.items():
        try: found = version(name).partition('+')[0]
        except PackageNotFoundError: continue # for another platform or another Python
        if found != pin: wrong[name] = (found, pin)
    assert not wrong, wrong
