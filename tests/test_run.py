"run.ipynb through papermill, from parameters to record, on a toy backbone and the embedded data"
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import nbformat
import pandas as pd
import pytest
from fastcore.docments import docments

from medpeft_study.config import RunConfig
from medpeft_study.generation import MEASURES
from medpeft_study.records import read_record
from medpeft_study.study import OUTSIDE, run_name

TOY = dict(backbone='toy-llama', device='cpu', rank=8, target_rank=2, max_steps=4, eval_rows=12, lr=2e-2, mode='auto', windows='256,384', generate=6, tracking='tensorboard', probes='all')


def papermill(root, reports, output=None, **params):
    "The user's command, with its files in a folder of the test"
    words = [w for k, v in params.items() for w in ('-p', k, str(v))]
    command = [str(Path(sys.executable).parent / 'papermill'), 'nbs/run.ipynb', *([str(output)] if output else []), *words]
    return subprocess.run(command, cwd=root, env=os.environ | dict(MEDPEFT_REPORTS=str(reports)), capture_output=True, text=True,
                          stdin=subprocess.DEVNULL, timeout=300)


@pytest.fixture(scope='module', params=['qlora', 'adalora'])
def finished(request, root, tmp_path_factory):
    "A finished run of each method: (method, folder, what papermill printed)"
    reports = tmp_path_factory.mktemp('reports')
    done = papermill(root, reports, method=request.param, **TOY)
    assert done.returncode == 0, done.stderr[-3000:]
    return request.param, reports, done.stdout


def test_the_run_leaves_record_predictions_figure_and_notebook(finished):
    method, reports, printed = finished
    id = run_name(dict(method=method, **TOY))
    record = read_record(reports / 'local' / 'records' / f'{id}.json')
    assert record['status'] == 'complete' and record['run_id'] == id
    assert record['resources']['used'] == {k: record['config'][k] for k in ('micro_batch_size', 'gradient_checkpointing')}
    assert len(record['history']) == 4 and record['data']['rows'] == dict(train=5000, validation=500, test=1000)
    predictions = pd.read_parquet(reports / 'local' / 'predictions' / f'{id}.parquet')
    assert len(predictions) == 2 * 12 and set(predictions.split) == {'validation'} # the held-out rows stay locked
    assert (reports / 'runs' / f'{id}.png').stat().st_size > 5000
    assert (reports / 'runs' / f'{id}.ipynb').is_file()
    for word in ('validation loss', 'accuracy', 'trainable parameters', f'{id}.json', f'{id}.png', f'{id}.ipynb', 'step    4/4', 'mode auto leaves'): assert word in printed, printed


def test_metrics_follow_from_the_predictions(finished):
    method, reports, _ = finished
    id = run_name(dict(method=method, **TOY))
    record = read_record(reports / 'local' / 'records' / f'{id}.json')
    predictions = pd.read_parquet(reports / 'local' / 'predictions' / f'{id}.parquet').query('when == "after"')
    value = {(m['metric'], m['protocol']): m['value'] for m in record['metrics'] if m['when'] == 'after' and m['domain'] == 'all'}
    assert value['loss', 'answer'] == pytest.approx(predictions.nll.sum() / predictions.n_tokens.sum())
    for protocol in ('text', 'text_norm', 'letter'):
        assert value['accuracy', protocol] == (predictions[protocol] == predictions.answer).mean()
    assert value['reported_loss', 'answer'] - value['loss', 'answer'] > (0.2 if method == 'adalora' else -0.2) # the penalty inside
    assert sum(record['ranks'].values()) == 14 * (2 if method == 'adalora' else 8)
    assert record['model'].get('nonzero_rank') == (14 * 2 if method == 'adalora' else None)
    answered = predictions.query('generated.notna()')
    assert answered.item_id.tolist() == predictions.item_id[:6].tolist() # the first rows, and no other
    for measure in MEASURES: assert value[measure, 'generated'] == pytest.approx(answered[measure].mean())
    assert {m['n'] for m in record['metrics'] if m['protocol'] == 'generated'} == {6}
    assert {f'generation {when}' for when in ('before', 'after')} < set(record['resources']['seconds'])
    assert 0 < value['padding_share', 'padded-256'] < value['padding_share', 'padded-384'] < 1 and value['loss', 'padded-384'] > 0 < value['loss', 'unpadded']


def test_probes_are_in_the_record_before_and_after(finished):
    method, reports, _ = finished
    record = read_record(reports / 'local' / 'records' / f'{run_name(dict(method=method, **TOY))}.json')
    assert run_name(dict(method=method, **TOY)) == run_name(dict(method=method, **{k: v for k, v in TOY.items() if k != 'probes'}))
    value = {(m['when'], m['protocol'], m['metric']): m['value'] for m in record['metrics'] if m['domain'] == 'all'}
    for when in ('before', 'after'):
        for protocol in ('text', 'text_norm', 'letter'): assert value[when, f'{protocol}-0-shot', 'accuracy'] == value[when, protocol, 'accuracy'] # all twelve rows
        assert value[when, 'letter-rotated-0', 'accuracy'] == value[when, 'letter', 'accuracy'] and 0 <= value[when, 'letter-5-shot', 'accuracy'] <= 1
        assert {f'{name} {when}' for name in ('few_shot', 'order', 'forgetting')} <= set(record['resources']['seconds'])
    assert value['before', 'general', 'loss'] != value['after', 'general', 'loss']


def test_tensorboard_has_the_numbers_of_the_record(finished):
    method, reports, printed = finished
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    id = run_name(dict(method=method, **TOY))
    assert id == run_name(dict(TOY, method=method, tracking='')) and f'{id}/tensorboard' in printed
    record, found = read_record(reports / 'local' / 'records' / f'{id}.json'), EventAccumulator(str(reports / 'runs' / id / 'tensorboard')).Reload()
    for name in ('task_loss', 'penalty', 'lr'):
        assert [(e.step, e.value) for e in found.Scalars(f'training/{name}')] == [(h['step'], pytest.approx(h[name])) for h in record['history']]
    after = [m['value'] for m in record['metrics'] if (m['metric'], m['protocol'], m['domain'], m['when']) == ('accuracy', 'text', 'all', 'after')]
    assert [e.value for e in found.Scalars('validation/text/accuracy')][1:] == [pytest.approx(v) for v in after]


def test_a_finished_run_is_not_run_again(finished, root):
    method, reports, _ = finished
    path = reports / 'local' / 'records' / f'{run_name(dict(method=method, **TOY))}.json'
    before = path.read_bytes()
    again = papermill(root, reports, method=method, **TOY)
    assert again.returncode == 0 and 'is complete' in again.stdout and 'validation loss' in again.stdout
    assert path.read_bytes() == before


def test_the_executed_notebook_is_clean(finished):
    "One bar, one curve, no warning, no path of this machine"
    method, reports, _ = finished
    nb = nbformat.read(reports / 'runs' / f'{run_name(dict(method=method, **TOY))}.ipynb', 4)
    outputs = [o for c in nb.cells if c.cell_type == 'code' for o in c.outputs]
    assert not [o.text for o in outputs if o.output_type == 'stream' and o.name == 'stderr']
    assert sum('image/png' in o.get('data', {}) for o in outputs) == 1


def test_a_failure_leaves_a_failed_record(root, tmp_path):
    "A learning rate that makes the loss infinite"
    bad = dict(TOY, method='qlora', lr=1e30, max_grad_norm=0)
    done = papermill(root, tmp_path, **bad)
    assert done.returncode != 0
    record = read_record(tmp_path / 'local' / 'records' / f'{run_name(bad)}.json')
    assert record['status'] == 'failed' and 'TrainingError' in record['error'] and 'HP:' in record['error']
    assert not (tmp_path / 'local' / 'predictions').exists()


def test_the_parameters_cell_is_the_config(root):
    "Every field with its type and its comment, those that are no fields, and nothing derived"
    nb = nbformat.read(root / 'nbs' / 'run.ipynb', 4)
    cell, = [c for c in nb.cells if 'parameters' in c.metadata.get('tags', [])]
    hints, documented = get_type_hints(RunConfig), {}
    for theme in RunConfig.__mro__[1:-1]: documented |= {k: v for k, v in docments(theme).items() if v}
    lines = {}
    for line in cell.source.splitlines():
        declared, _, comment = line.partition('  # ')
        name, _, rest = declared.partition(': ')
        lines[name] = (rest, comment)
    assert set(lines) == {f.name for f in fields(RunConfig)} | set(OUTSIDE)
    for name, (rest, comment) in lines.items():
        if name in OUTSIDE: continue
        kind = getattr(hints[name], '__args__', (hints[name],))[0].__name__
        assert rest in (f'Optional[{kind}] = None', "str = 'smoke'", "str = 'qlora'") and comment == ' '.join(documented[name].split()), name
