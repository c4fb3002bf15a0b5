"What an installation promises: caps that hold, entry points that are there, notebooks that any environment can open"
import json
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT/'nbs').glob('*.ipynb'))


def run(*args): return subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True)


def test_packages_agree():
    done = run('-m', 'pip', 'check')
    assert done.returncode == 0, done.stdout


def test_nbdev_imports():
    "pip check does not see that execnb 0.2 or fastcore 2 break it"
    done = run('-c', 'import nbdev.export, nbdev.test, nbdev.clean, nbdev.doclinks')
    assert done.returncode == 0, done.stderr


def test_constraints_meet_the_requirements():
    "Every requirement has an exact pin that it allows; no pin names the build of one platform"
    settings = ConfigParser(delimiters='=')
    settings.read(ROOT/'settings.ini')
    pins = dict(line.split('==') for line in (ROOT/'constraints.txt').read_text().splitlines() if not line.startswith('#'))
    for wanted in map(Requirement, ' '.join(settings['DEFAULT'][k] for k in ['requirements', 'dev_requirements']).split()):
        if wanted.name == 'triton': continue # PyTorch for CUDA brings the one that it was built with
        assert pins[wanted.name] in wanted.specifier, wanted
    assert not [name for name, version in pins.items() if '+' in version or name.startswith(('nvidia', 'triton'))]


@pytest.mark.parametrize('module', ['config', 'papermill_hook'])
def test_light_modules_take_no_torch(module):
    assert run('-c', f'import sys, medpeft_study.{module}; sys.exit("torch" in sys.modules)').returncode == 0


def test_entry_points():
    assert {e.value for e in entry_points(group='papermill.engine')} >= {'medpeft_study.papermill_hook'}
    assert (Path(sys.executable).parent/'medpeft').is_file()


@pytest.mark.parametrize('path', SOURCES, ids=lambda path: path.stem)
def test_notebooks_run_in_any_environment(path):
    nb = json.loads(path.read_text())
    assert nb['metadata']['kernelspec'] == dict(name='python3', display_name='python3', language='python')
    tagged = [cell for cell in nb['cells'] if 'parameters' in cell['metadata'].get('tags', [])]
    assert len(tagged) == (path.stem in ('run', 'bench')) # those that papermill gives parameters
