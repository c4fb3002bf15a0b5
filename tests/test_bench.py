"The bench of contenders: the same rows, one process a point, one whole file whatever goes wrong"
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import typer
from typer.testing import CliRunner

from medpeft_study import contenders
from medpeft_study.contenders import CONTENDERS, Setting, Variant, compare, points_frame, setting_rows, variant_config, variants
from medpeft_study.planning import model_flops

TOY = Setting('toy-llama', 'cpu', steps=6, rank=16, row_tokens=24, row_spread=7, answer_tokens=4)
WORDS = dict(backbone='toy-llama', device='cpu', steps=6, rank=16, row_tokens=24, row_spread=7, answer_tokens=4)


def losses(name, tmp_path, setting=TOY, **changes):
    "First and last loss of a contender"
    v = Variant(name, '', dropout=0., **changes)
    cfg = variant_config(v, setting)
    found = CONTENDERS[name](cfg, setting_rows(cfg, setting), v, tmp_path)
    return found['first_loss'], found['last_loss']


@pytest.mark.parametrize('name, changes', [('trainer', dict(micro=16)), ('trainer', dict(micro=4, again=True)), ('trl', dict(micro=4)),
                                           ('trl', dict(options=dict(padding_free=True)))])
def test_contenders_take_the_same_steps(name, changes, tmp_path):
    "The adapter begins at zero: the first loss is the backbone's on the same rows, and five steps later the training's"
    first, last = losses('ours', tmp_path)
    theirs = losses(name, tmp_path, **changes)
    assert abs(theirs[0] - first) < 1e-3 and abs(theirs[1] - last) < 1e-3
    other = losses(name, tmp_path, replace(TOY, row_tokens=30), **changes)[0]
    assert abs(other - first) > 1e-3 # other rows would have shown


def test_the_allocator_prunes_in_the_trainer(tmp_path):
    from medpeft_study.adapters import nonzero_ranks
    cfg = variant_config(Variant('trainer', '', 'adalora', micro=4, dropout=0.), TOY)
    trainer = contenders.peft_trainer(cfg, setting_rows(cfg, TOY), tmp_path)
    contenders.timed(trainer, cfg)
    assert 0 < sum(nonzero_ranks(trainer.model).values()) <= 8 * 14 < 16 * 14 # 14 adapters of rank 16, 8 on average kept


def test_what_fails_is_a_point_and_the_file_is_whole(tmp_path, monkeypatch):
    good, bad = Variant('ours', 'good', micro=4), Variant('ours', 'bad', options=dict(mode='hasty'))
    monkeypatch.setattr(contenders, 'variants', lambda device: [bad, good])
    said = []
    content = compare(tmp_path / 'c.json', TOY, timeout=120, say=said.append)
    assert json.loads((tmp_path / 'c.json').read_text()) == content and len(said) == 2
    failed, measured = content['points']
    assert "'hasty' is unknown" in failed['error'] and 'ms' not in failed
    common = ('contender', 'variant', 'backbone', 'method', 'rank', 'dropout', 'micro_batch_size', 'accumulation', 'gradient_checkpointing')
    assert all(k in p for p in content['points'] for k in common)
    assert all(k in measured for k in ('tokens', 'ms', 'ms_quartiles', 'tokens_per_s', 'steps', 'first_loss', 'last_loss')) and 'error' not in measured
    assert measured['accumulation'] * measured['micro_batch_size'] == 16 and measured['ms_quartiles'][0] <= measured['ms'] <= measured['ms_quartiles'][1]
    assert content['machine']['device'] and content['provenance']['packages']['trl'] and content['setting']['steps'] == 6
    assert points_frame(content)['variant'].tolist() == ['good', 'bad']


@pytest.fixture
def apart(monkeypatch):
    "Processes that only say they ran: Unsloth does not load NF4, the Trainer fails at its first try"
    calls = []

    def run(task, v, setting, scratch, timeout):
        calls.append((task, v.contender))
        if task == 'machine': return dict(device='an H100', matrix_tflops=700., copy_tbps=2.7)
        if task in ('nf4', 'plain'): (scratch / task).mkdir(); return {}
        if v.contender == 'unsloth' and not (scratch / 'plain').exists(): return dict(error='RuntimeError: Loading nf4: KeyError: absmax')
        if v.contender == 'trainer' and calls.count((task, v.contender)) == 1: return dict(error='OutOfMemoryError: CUDA out of memory.')
        return dict(ms=147., model_tflop=model_flops(variant_config(Variant('ours', ''), replace(setting, device='cpu')), 1893) / 1e12, tokens=1893, tokens_per_s=12878.)

    monkeypatch.setattr(contenders, 'apart', run)
    monkeypatch.setattr(contenders, 'settled', lambda setting: replace(setting, device='cuda'))
    return calls


def test_a_run_goes_on_where_it_stopped(tmp_path, apart):
    out, llama = tmp_path / 'c.json', Setting()
    first = compare(out, llama, ['trainer'], ['qlora'], say=str)
    assert ['error' in p for p in first['points']] == [True, False, False]
    share = first['points'][1]['peak_share']
    assert 0.5 < share < 0.56 # 1,893 tokens of Llama-3-8B need 54 TFLOP; in 147 ms at 700 TFLOP/s
    second = compare(out, llama, ['trainer', 'unsloth'], ['qlora'], say=str)
    assert sum(c == ('point', 'trainer') for c in apart) == 4 # three, and the one that failed
    assert not any('error' in p for p in second['points']) and len(second['points']) == 3 + 9
    assert [c for c in apart if c[1] == 'unsloth' and c[0] != 'machine'][:4] == [('nf4', 'unsloth'), ('point', 'unsloth'), ('plain', 'unsloth'), ('point', 'unsloth')]


def test_every_gpu_variant_resolves():
    "But for what only a GPU takes: 8-bit moments"
    for v in variants('cuda'):
        if v.options.get('mode') != 'lean': assert variant_config(v, Setting(device='cpu')).method == v.method
    assert not any(v.method == 'adalora' for v in variants('cuda') if v.contender in ('unsloth', 'trl'))


@pytest.mark.parametrize('words, said', [([], 'Say --all'), (['--contenders', 'theirs'], "'theirs' is unknown"), (['--all', '--steps', '3'], 'steps = 3'),
                                         (['--all', '--backbone', 'lama3'], "'lama3' is unknown"), (['--all', '--only', '5 x 5'], 'leaves no variant')])
def test_a_wrong_command_is_one_sentence(words, said):
    app = typer.Typer()
    app.command()(contenders.main)
    done = CliRunner().invoke(app, ['--device', 'cpu', *words])
    assert done.exit_code == 2 and said in done.output and done.output.count('\n') == 1


def command(*words, **kwargs):
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=240, stdin=subprocess.DEVNULL, **kwargs)


def test_the_notebook_measures_and_refuses(tmp_path, root):
    env = os.environ | dict(MEDPEFT_REPORTS=str(tmp_path / 'reports'))
    words = [w for k, v in WORDS.items() for w in ('-p', k, str(v))]
    out = tmp_path / 'toy.json'
    done = command('-m', 'papermill', 'nbs/bench.ipynb', *words, '-p', 'contenders', 'ours', '-p', 'methods', 'qlora', '-p', 'out', str(out), cwd=root, env=env)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'reports' / 'runs' / 'bench.ipynb').is_file()
    [point] = json.loads(out.read_text())['points']
    assert point['contender'] == 'ours' and point['ms'] > 0 and 'papermill nbs/bench.ipynb -p' in json.loads(out.read_text())['command']
    refused = command('-m', 'papermill', 'nbs/bench.ipynb', '-p', 'contender', 'ours', cwd=root, env=env)
    assert refused.returncode == 2 and 'contender is not a parameter of a bench' in refused.stderr
