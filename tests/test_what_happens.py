"The page 'What happens when' quotes what the program says, and shows the figures of reliability that are there"
import json
import re
import subprocess
import sys

import nbformat
import pytest

from medpeft_study.reliability import PARTS, read_reliability, reliability_table

ELSEWHERE = {'No space left on device', 'trainable_adapter_name', 'model.get_base_model()', 'torch.cuda.is_available()', 'ModuleNotFoundError', 'data.fingerprints', 'resources.used',
             'constraints.txt', 'RuntimeWarning', 'AttributeError'} # said by others, or names


def tables(root):
    "The rows of the page: (what, seen, to do)"
    nb = nbformat.read(root / 'nbs' / 'what_happens_when.ipynb', 4)
    lines = '\n'.join(c.source for c in nb.cells if c.cell_type == 'markdown').splitlines()
    return [line.strip('|').split('|') for line in lines if line.startswith('| ') and not line.startswith('| what goes wrong')]


def test_every_quoted_sentence_is_in_the_code(root):
    "Between what changes from case to case, to the letter"
    code = '\n'.join(p.read_text(encoding='utf-8') for p in sorted((root / 'medpeft_study').glob('*.py')))
    code = re.sub(r"'\s*\n\s*f?'", '', code) # a sentence over two lines
    rows = tables(root)
    assert len(rows) > 40 and all(len(r) == 3 and all(cell.strip() for cell in r) for r in rows)
    quoted = [piece.strip() for _, seen, _ in rows for quote in re.findall(r'`([^`]+)`', seen) for piece in quote.split('…') if len(piece.strip()) > 10]
    assert len(quoted) > 50
    assert not [q for q in quoted if q not in code and q not in ELSEWHERE]


def test_every_command_of_the_page_is_there(root):
    text = '\n'.join(cell for row in tables(root) for cell in row)
    make = (root / 'Makefile').read_text()
    for target in re.findall(r'`make (\w+)', text): assert f'\n{target}:' in make
    for command in re.findall(r'`medpeft (\w+)', text): assert command in ('plan', 'run', 'study', 'export')


def test_the_page_shows_the_committed_figures(root):
    nb = nbformat.read(root / 'nbs' / 'what_happens_when.ipynb', 4)
    shown = ''.join(o.get('data', {}).get('text/markdown', '') for c in nb.cells if c.cell_type == 'code' for o in c.outputs)
    assert reliability_table(read_reliability(root / 'reports')) in shown


@pytest.mark.parametrize('parts, status', [((), 2), (('torture',), 1), (('torture', 'corpus', 'fuzz-record', 'fuzz-dataset'), 0)])
def test_the_figures_are_joined_whole(root, tmp_path, parts, status):
    made = dict(torture=dict(kills=2, equal=2, seconds=1., checkpoint_share=.01, command='a'), corpus=dict(cases=1, by_kind=dict(data=1), clear=1, seconds=1., command='b'))
    for name in parts:
        part = made.get(name) or dict(target=name.removeprefix('fuzz-'), seconds=1., runs=9, escapes=0, command='c')
        (tmp_path / f'{name}.json').write_text(json.dumps(part))
    done = subprocess.run([sys.executable, 'tests/reliability.py', str(tmp_path), '--out', str(tmp_path / 'out' / 'found.json')], cwd=root, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert 'Traceback' not in done.stderr
    if parts: assert set(json.loads((tmp_path / 'out' / 'found.json').read_text())) == {p.partition('-')[0] for p in parts} <= set(PARTS)
    else: assert not (tmp_path / 'out').exists() and done.stderr.count('\n') == 1
