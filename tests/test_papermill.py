"The user's command, to the letter: the real papermill on a small project, in a terminal, through pipes and from several folders"
import importlib
import inspect
import json
import os
import pty
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import nbformat
import pytest
from click.testing import CliRunner
from nbformat.v4 import new_code_cell, new_notebook
from papermill import cli

from medpeft_study.papermill_hook import _OURS

PAPERMILL = Path(sys.executable).parent/'papermill'
RUN = ['nbs/run.ipynb', '-p', 'method', 'adalora']
LINE = "import os; print('step 1', os.environ['MEDPEFT_NOTEBOOK'], flush=True)"


@pytest.fixture
def project(tmp_path, monkeypatch):
    "A project of two notebooks: a run that prints one line, and another"
    for name in ['MEDPEFT_REPORTS', 'MEDPEFT_NOTEBOOK']: monkeypatch.delenv(name, raising=False)
    (tmp_path/'nbs').mkdir()
    (tmp_path/'settings.ini').write_text('[DEFAULT]\nlib_name = medpeft_study\n')
    kernel = dict(kernelspec=dict(name='python3', display_name='python3', language='python'))
    parameters = new_code_cell("method = 'qlora'\nrank = 64", metadata=dict(tags=['parameters']))
    run = new_notebook(cells=[parameters, new_code_cell(LINE), new_code_cell('method, rank')], metadata=kernel)
    nbformat.write(run, tmp_path/'nbs'/'run.ipynb')
    nbformat.write(new_notebook(cells=[new_code_cell("print('a table')")], metadata=kernel), tmp_path/'nbs'/'other_source.ipynb')
    return tmp_path


def papermill(*args, cwd, code=0, **kwargs):
    "Run papermill and expect an exit code"
    stdin = {} if 'input' in kwargs else dict(stdin=subprocess.DEVNULL)
    done = subprocess.run([PAPERMILL, *args], cwd=cwd, text=True, capture_output=True, timeout=120, **stdin, **kwargs)
    assert done.returncode == code, done.stderr
    return done


def files(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def last_value(path): return nbformat.read(path, 4).cells[-1].outputs[0]['data']['text/plain']


def executed(project):
    "The one executed notebook of the project"
    [path] = (project/'reports'/'runs').glob('*.ipynb')
    assert path.name.startswith('adalora-smollm2-135m-') and last_value(path) == "('adalora', 64)"
    return path


@pytest.mark.parametrize('folder, source', [('.', 'nbs/run.ipynb'), ('nbs', 'run.ipynb'), ('..', '{}/nbs/run.ipynb')])
def test_finds_its_output_from_any_folder(project, folder, source):
    before = files(project)
    done = papermill(source.format(project), *RUN[1:], cwd=project/folder)
    path = executed(project)
    assert done.stdout == f'step 1 {path}\n'
    assert files(project) == before | {path.relative_to(project).as_posix(): path.read_bytes()}


def test_in_a_terminal(project):
    ours, theirs = pty.openpty()
    child = subprocess.Popen([PAPERMILL, *RUN], cwd=project, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b''
    try:
        while chunk := os.read(ours, 4096): shown += chunk
    except OSError: pass # how Linux says that the terminal was closed
    os.close(ours)
    assert child.wait(timeout=120) == 0, shown.decode()
    assert f'\r\nstep 1 {executed(project)}\r\n' in shown.decode() # a line of its own, no bar around it


def test_a_pipe_as_stdin_never_overwrites_the_source(project):
    before = files(project)
    papermill(*RUN, cwd=project, input='')
    executed(project)
    assert files(project).items() > before.items()


def test_lines_appear_while_the_run_goes_on(project):
    source = project/'nbs'/'run.ipynb'
    nb = nbformat.read(source, 4)
    nb.cells[1].source += '\nimport time; time.sleep(60)'
    nbformat.write(nb, source)
    child = subprocess.Popen([PAPERMILL, *RUN], cwd=project, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert child.stdout.readline().startswith('step 1') and child.poll() is None
    child.terminate()
    child.communicate()


def test_as_a_module(project):
    subprocess.run([sys.executable, '-m', 'papermill', *RUN], cwd=project, check=True, capture_output=True, timeout=120)
    executed(project)


def test_other_sources_are_named_after_themselves(project):
    assert papermill('nbs/other_source.ipynb', cwd=project).stdout == 'a table\n'
    assert (project/'reports'/'runs'/'other_source.ipynb').is_file()


def test_explicit_outputs_are_left_alone(project):
    papermill('-p', 'rank', '8', 'nbs/run.ipynb', 'mine.ipynb', '--parameters', 'method', 'adalora', cwd=project)
    assert last_value(project/'mine.ipynb') == "('adalora', 8)"
    nb = json.loads(papermill('nbs/other_source.ipynb', '-', cwd=project).stdout)
    assert nb['cells'][-1]['outputs'][0]['text'] == ['a table\n']
    assert not (project/'reports').exists()


def test_notebooks_of_others_are_left_alone(project):
    (project/'nbs'/'other_source.ipynb').rename(project/'other_source.ipynb')
    json.loads(papermill('other_source.ipynb', cwd=project).stdout) # papermill's own answer to a pipe
    assert not (project/'reports').exists()


def refused(said, stderr): return stderr.startswith('Error: ') and said in stderr and stderr.count('\n') == 1


def test_a_wrong_run_is_refused_in_seconds(project):
    before, start = files(project), time.monotonic()
    done = papermill('nbs/run.ipynb', '-p', 'lrr', '1', cwd=project, code=2)
    assert time.monotonic() - start < 20
    assert refused('lrr', done.stderr) and done.stdout == '' and files(project) == before


@pytest.mark.parametrize('args, said', [
    ('-p method adalroa', 'adalroa'), ('-p backbone smolm', 'smolm'), ('-p rank 0', 'rank = 0'), ('-p lr -1e-4', 'lr = -0.0001'),
    ('-p method adalora -p target_rank 65', 'target_rank = 65'), ('-p method adalora -p budget_start 0.7', 'budget_start = 0.7'),
    ('-r rank 8', "rank = '8'"), ('-b x', 'base64'), ("-y '{seed: -1}'", 'seed = -1'), ('mine.ipynb -p rank 0', 'rank = 0'), ('- -p prompt opne', 'opne'),
    ('nbs/../nbs/run.ipynb', 'source notebook')])
def test_a_wrong_run_is_refused_in_one_sentence_before_anything_is_written(project, monkeypatch, args, said):
    monkeypatch.chdir(project)
    before = files(project)
    with patch.dict(os.environ): done = CliRunner().invoke(cli.papermill, ['nbs/run.ipynb', *shlex.split(args)])
    assert done.exit_code == 2 and refused(said, done.stderr), done.output
    assert done.stdout == '' and files(project) == before and not (project/'reports').exists()


def test_every_error_that_a_run_may_end_in_is_told_as_a_sentence(root):
    used = set(re.findall(r'from medpeft_study\.(\w+) import', (root / 'nbs' / 'run.ipynb').read_text(encoding='utf-8')))
    reached, todo = set(), used
    while todo: # what a run imports, directly or not
        reached |= todo
        todo = {m for name in todo for m in re.findall(r'^from \.(\w+) import', (root / 'medpeft_study' / f'{name}.py').read_text(encoding='utf-8'), re.M)} - reached
    classes = {v.__name__ for name in reached for v in vars(importlib.import_module(f'medpeft_study.{name}')).values()
               if inspect.isclass(v) and issubclass(v, Exception) and v.__module__ == f'medpeft_study.{name}'}
    assert classes == set(_OURS)
