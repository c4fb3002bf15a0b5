"A few seconds of the fuzzer; the long runs are python tests/fuzz.py --seconds 600"
import json
import subprocess
import sys

import pytest

pytest.importorskip('atheris', reason='atheris has wheels for Linux on x86_64 alone')


@pytest.mark.parametrize('target', ['record', 'dataset'])
def test_nothing_escapes_a_reader(target, root, tmp_path):
    out = tmp_path / 'fuzz.json'
    done = subprocess.run([sys.executable, 'tests/fuzz.py', '--target', target, '--seconds', '12', '--out', str(out)], cwd=root, capture_output=True, text=True, timeout=120)
    assert out.exists(), done.stderr[-3000:] # the reader brought the process down
    found = json.loads(out.read_text())
    assert done.returncode == 0 and found['escapes'] == 0, done.stdout[-3000:]
    assert found['runs'] > 100
