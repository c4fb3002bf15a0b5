"A study made by the engine: real runs through papermill, in processes of this machine and on a Ray cluster of two nodes"
import os
import re
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
from typer.testing import CliRunner

from medpeft_study import engine
from medpeft_study.cli import app
from medpeft_study.config import report_paths
from medpeft_study.records import read_record
from medpeft_study.study import STUDIES, StudySpec

TOY = dict(backbone='toy-llama', device='cpu', rank=4, target_rank=2, train_rows=64, val_rows=8, eval_rows=8, test_rows=0, max_length=128)


@pytest.fixture
def study(monkeypatch, tmp_path):
    "A study of toy runs, into a reports folder of its own"
    monkeypatch.setenv('MEDPEFT_REPORTS', str(tmp_path / 'reports'))
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    def make(**grid): monkeypatch.setitem(STUDIES, 'smoke', StudySpec('a test', TOY, (grid,)))
    return make


def records(): return {p.stem: read_record(p) for p in report_paths('smoke').record('x').parent.glob('*.json')}


def test_what_is_missing_is_made_and_a_failure_takes_nothing_with_it(study):
    study(method=('qlora',), lr=(1e-3, 1e30))
    done = CliRunner().invoke(app, ['study', 'smoke', '--workers', '2'])
    assert done.exit_code == 1 and '1 of 2 runs failed' in done.output and re.search(r'qlora-toy-llama-\w+: The (task loss|gradient norm) is (nan|inf) at step', done.output)
    assert [r['status'] for r in records().values()].count('complete') == 1
    before = {name: r['provenance'] for name, r in records().items() if r['status'] == 'complete'}
    again = engine.run_study('smoke', only='lr 0.001')
    assert [j.state for j in again] == ['kept'] and before.items() <= {name: r['provenance'] for name, r in records().items()}.items()
    logs = list(report_paths().runs.glob('*.log'))
    assert len(logs) == 2 and all('step ' in p.read_text() for p in logs)


def test_ctrl_c_stops_the_runs_and_the_same_command_goes_on(study, tmp_path, root):
    study(method=('adalora',), epochs=(10,))
    code = ('import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n' # a job in the background ignores it
            'from medpeft_study import engine, study\n'
            f'study.STUDIES["smoke"] = study.StudySpec("a test", {TOY!r}, ({dict(method=("adalora",), epochs=(10,))!r},))\n'
            'engine.run_study("smoke", workers=2)')
    process = subprocess.Popen([sys.executable, '-c', code], cwd=root, env=os.environ | dict(MEDPEFT_CHECKPOINT_SECONDS='0'), stderr=subprocess.PIPE, text=True, start_new_session=True)
    runs, end = report_paths().runs, time.monotonic() + 120
    while time.monotonic() < end and not list(runs.glob('state/*/*.safetensors')): time.sleep(.2)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(60) != 0
    assert not [p for p in psutil.process_iter(['cmdline']) if 'ipykernel' in ' '.join(p.info['cmdline'] or []) and str(tmp_path) in str(p.environ())]
    assert not any(r['status'] == 'complete' for r in records().values())
    jobs = engine.run_study('smoke')
    assert {j.state for j in jobs} == {'complete'}
    assert all('taken_up' in r['provenance'] for r in records().values())


@pytest.fixture
def two_nodes():
    "A Ray cluster of a head that makes no runs and two nodes that make one each"
    ray = pytest.importorskip('ray', reason='Ray is not installed: pip install ray')
    from ray.cluster_utils import Cluster
    cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=0, include_dashboard=False))
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    yield cluster, nodes
    ray.shutdown()
    cluster.shutdown()


def machine(node) -> list: # of psutil processes, parents first
    "A node's agent, its workers, and what they have started"
    raylet = psutil.Process(node.all_processes['raylet'][0].process.pid)
    return [raylet, *raylet.children(recursive=True)]


def test_a_lost_machine_loses_no_run_and_none_is_made_twice(study, two_nodes):
    cluster, (node, _) = two_nodes
    study(method=('qlora',), seed=(0, 1))
    lost = []
    def lose(): # a machine in the middle of a run
        while not any('ipykernel' in ' '.join(p.cmdline()) for p in lost): time.sleep(.5); lost[:] = machine(node)
        for process in lost: process.kill()
        cluster.remove_node(node, allow_graceful=False)
    threading.Thread(target=lose, daemon=True).start()
    jobs = engine.run_study('smoke', engine='ray', address=cluster.address)
    assert lost and {j.state for j in jobs} == {'complete'}, [(j.state, j.said) for j in jobs]
    found = records()
    assert sorted(found) == sorted(j.id for j in jobs) and len(found) == 2 and all(r['status'] == 'complete' for r in found.values())
    assert len(list(report_paths('smoke').predictions('x').parent.glob('*.parquet'))) == 2
    assert {j.state for j in engine.run_study('smoke')} == {'kept'}
