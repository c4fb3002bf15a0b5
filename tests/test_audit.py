"The audit tells 'nothing found' from 'nobody answered', and the environment from the lock"
import json

import audit


def said(*packages): return json.dumps(dict(dependencies=list(packages)))


GOOD, BAD = dict(name='a', version='1', vulns=[]), dict(name='b', version='2', vulns=[dict(id='X-1', fix_versions=['3'])])


def test_an_answer_is_told_from_silence():
    assert audit.understood(said(GOOD), 0) == (1, [])
    assert audit.understood(said(GOOD, BAD), 1) == (2, ['b 2: X-1, fixed in 3'])
    for output, code in (('', 1), ('', 0), ('connection refused', 1), (said(), 0), (said(GOOD), 1), (said(dict(name='a', skip_reason='not reached')), 0), ('[]', 0)):
        assert audit.understood(output, code) is None, output


def test_an_environment_is_told_from_its_lock():
    locked = {'a': '1', 'torch': '2'}
    assert audit.differences({'a': ('1', []), 'torch': ('2+cpu', ['cuda-lib==9; platform_system == "Linux"']), 'cuda-lib': ('9', [])}, locked) == []
    assert len(audit.differences({'a': ('2', []), 'b': ('1', [])}, locked)) == 2
    assert audit.differences({'c': ('1', ['d==1']), 'd': ('1', [])}, locked) != [] # a stranger vouches for nobody


def test_every_line_of_the_lock_is_a_pin():
    lines = [l for l in audit.LOCK.read_text().splitlines() if l and not l.startswith('#')]
    assert len(audit.pins(lines)) == len(lines)
