"Sixteen processes finish sixteen runs into one reports folder at the same moment"
import json
import multiprocessing
import os
from dataclasses import replace

import matplotlib
import numpy as np
import pandas as pd

from medpeft_study.config import make_config
from medpeft_study.data import resolve_data
from medpeft_study.backbones import resolve_backbone
from medpeft_study.adapters import resolve_adapter
from medpeft_study.frames import load_predictions
from medpeft_study.records import Recorder, read_record

PROCESSES = 16


def config(seed): return resolve_adapter(resolve_backbone(resolve_data(make_config('smoke', backbone='toy-llama', device='cpu', rank=4, seed=seed))))


def results(seed): # as large as a real run's, and each different
    rng = np.random.default_rng(seed)
    metric = dict(split='validation', when='after', protocol='answer', domain='all', metric='loss', stderr=.1, low=1., high=2., n=64)
    metrics = [dict(metric, value=float(v)) for v in rng.random(400)]
    history = [dict(step=i, tokens=90, input_tokens=900, lr=0., task_loss=float(v), penalty=0., grad_norm=1., reported_loss=6.4, total_rank=56) for i, v in enumerate(rng.random(313), 1)]
    predictions = pd.DataFrame(dict(item_id=[f'{seed}/{i}' for i in range(1000)], domain='d', split='validation', when='after', answer=0, nll=rng.random(1000), n_tokens=5, text=0, text_norm=0, letter=0))
    parts = dict(metrics=metrics, ranks=dict(q_proj=seed + 1), data=dict(fingerprints=dict(train=str(seed)), rows=dict(train=48)),
                 model=dict(id='toy-llama', revision='', parameters={k: seed for k in ('total', 'packed', 'trainable', 'effective', 'share_of_total', 'share_of_packed')}))
    return predictions, history, parts


def finish(seed, gate, reports):
    from matplotlib.figure import Figure
    os.environ['MEDPEFT_REPORTS'] = str(reports)
    recorder = Recorder(config(seed), command=f'seed {seed}')
    predictions, history, parts = results(seed)
    gate.wait(120)
    recorder.finish(predictions, Figure(figsize=(1, 1)), history, **parts)
    Recorder(config(seed), force=True).fail(RuntimeError('a later failure')) # takes nothing back


def test_nothing_is_lost_and_nothing_mixed(tmp_path, monkeypatch):
    matplotlib.use('Agg')
    reports, fork = tmp_path / 'reports', multiprocessing.get_context('fork') # the imports are done once
    gate = fork.Barrier(PROCESSES)
    children = [fork.Process(target=finish, args=(seed, gate, reports)) for seed in range(PROCESSES)]
    for c in children: c.start()
    for c in children: c.join(300)
    assert [c.exitcode for c in children] == [0] * PROCESSES
    base, seen = reports / 'local', set()
    for path in (base / 'records').iterdir():
        record = read_record(path)
        seed = record['config']['seed']
        predictions, history, parts = results(seed)
        assert record['status'] == 'complete' and path.stem == record['run_id'] and record['provenance']['command'] == f'seed {seed}'
        assert {k: record[k] for k in parts} == parts and record['history'] == history
        pd.testing.assert_frame_equal(load_predictions(record['run_id'], base), predictions)
        seen.add(seed)
    assert seen == set(range(PROCESSES))
    names = [p.name for p in reports.rglob('*') if p.is_file()]
    assert len(names) == 3 * PROCESSES and not [n for n in names if n.startswith('.')] # record, predictions, figure; no temporary file


def test_a_process_killed_while_it_writes_leaves_the_record_that_was_there(tmp_path, monkeypatch):
    "At no moment is there half a record under its name"
    from medpeft_study.records import write_json
    path = tmp_path / 'a.json'
    fork = multiprocessing.get_context('fork')

    def write(n):
        while True: write_json(dict(n=n, filler=['x' * 100] * 2000), path)
    write_json(dict(n=0, filler=[]), path)
    children = [fork.Process(target=write, args=(n,)) for n in range(1, 4)]
    for c in children: c.start()
    for _ in range(200): assert json.loads(path.read_text())['n'] in range(4)
    for c in children: c.kill()
    for c in children: c.join()
    assert json.loads(path.read_text())['n'] in range(4)
