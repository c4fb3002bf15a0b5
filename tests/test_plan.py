"`medpeft plan`, to the letter: what fits is said in seconds, without a network, and what does not fit in one sentence"
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from medpeft_study.planning import MODES
from medpeft_study.study import run_config

OFFLINE = dict(HF_HUB_OFFLINE='1', http_proxy='http://127.0.0.1:9', https_proxy='http://127.0.0.1:9', CUDA_VISIBLE_DEVICES='')


def plan(words, root, tmp_path, code=0):
    "What the command prints, and says when it fails"
    done = subprocess.run([str(Path(sys.executable).parent / 'medpeft'), 'plan', *shlex.split(words)], cwd=root, capture_output=True, text=True,
                          timeout=120, env=os.environ | OFFLINE | dict(HF_HOME=str(tmp_path), MEDPEFT_CACHE=str(tmp_path)))
    assert done.returncode == code, done.stdout + done.stderr
    assert not [p for p in tmp_path.rglob('*.safetensors')] and not [p for p in tmp_path.rglob('*.gguf')]
    return done.stdout, done.stderr


def rows(printed): return {w[0]: w[1:] for w in map(str.split, printed.splitlines()) if w and w[0] in MODES and len(w) == 5}


def test_a_plan_has_every_mode_and_the_command_of_the_one_that_fits(root, tmp_path):
    printed, said = plan('--backbone llama3-8b --method adalora --gpu-memory 12', root, tmp_path)
    table = rows(printed)
    assert list(table) == list(MODES) and said == ''
    peaks = [float(r[0]) for r in table.values()]
    assert peaks == sorted(peaks, reverse=True) and table['fast'][1] == 'no' and 3.5 < peaks[-1] < 12
    command = shlex.split(printed.splitlines()[-1])
    assert command[:2] == ['papermill', 'nbs/run.ipynb']
    params = dict(re.findall(r'-p (\S+) (\S+)', ' '.join(command)))
    assert params == dict(profile='paper', backbone='llama3-8b', method='adalora', mode=next(m for m, r in table.items() if r[1] == 'yes'))
    if params['mode'] in ('fast', 'packed', 'halved'): run_config(params) # the others ask for a GPU


def test_more_parameters_and_other_cards(root, tmp_path):
    less = rows(plan('--gpu-memory 80 --card l4 rank=8 target_modules=q_proj,v_proj --tokens 800', root, tmp_path)[0])
    more = rows(plan('--gpu-memory 80 --card l4 loss_scope=padded', root, tmp_path)[0])
    assert all(float(less[m][0]) < float(more[m][0]) and float(less[m][2].replace(',', '')) <= float(more[m][2].replace(',', '')) for m in MODES)


@pytest.mark.parametrize('words, said', [
    ('--gpu-memory 2', 'llama3-8b with qlora does not fit 2.0 GiB'), ('--gpu-memory 80 --backbone lama3', "'lama3' is unknown"),
    ('--gpu-memory 80 --method adalroa', "'adalroa' is unknown"), ('', 'no CUDA device'), ('--gpu-memory 80 --card h1000', "card = 'h1000' is unknown"),
    ('--gpu-memory 80 rank=0', 'rank = 0'), ('--gpu-memory 80 rank', 'not a name=value pair'), ('--gpu-memory 80 --backbone no/such-model', 'the hub cannot be reached'),
    ('--gpu-memory 80 mode=lean', 'mode is what a plan finds'), ('--gpu-memory -1', 'gpu-memory = -1 must be above 0')])
def test_what_cannot_be_planned_is_one_sentence(root, tmp_path, words, said):
    printed, error = plan(words, root, tmp_path, code=2)
    assert said in error and error.count('\n') == 1 and 'Traceback' not in error
    assert (rows(printed) != {}) == ('does not fit' in said) # the table is shown where there is one
