"""Are the packages of this environment known to be bad? `make audit`

Asks pip-audit about the lock where its service answers; where it does not, which pip-audit by itself reports as 'nothing
found', compares what is installed with the lock, exactly. One line says which of the two was done."""
import json
import re
import subprocess
import sys
import tempfile
import venv
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / 'constraints.txt'
FREE = {'triton'} # PyTorch for CUDA pins its own, which differs from one build to the next; beside another build any serves
TOOL = 'pip-audit==2.10.1'  # installed in a folder of its own: it is no part of the environment
OURS = {'pip', 'medpeft-study'}


def name(text): return re.sub(r'[-_.]+', '-', text).lower()
def pins(lines): return {name(n): v for n, v in re.findall(r'^([A-Za-z0-9._-]+)==([^\s;#]+)', '\n'.join(lines), re.M)}


def understood(output: str, code: int): # -> packages asked about, list of findings; None if the service did not answer for all
    "What pip-audit found, if it found out anything"
    try: packages = json.loads(output)['dependencies']
    except (ValueError, KeyError, TypeError): return None
    if not packages or any('skip_reason' in p for p in packages): return None
    found = [f"{p['name']} {p['version']}: {v['id']}" + (f", fixed in {', '.join(v['fix_versions'])}" if v.get('fix_versions') else '') for p in packages for v in p['vulns']]
    return None if code and not found else (len(packages), found)


def asked(lock=LOCK): # of `understood`
    "Ask pip-audit about the lock"
    with tempfile.TemporaryDirectory() as tmp:
        venv.create(tmp, with_pip=True)
        python = Path(tmp) / 'bin' / 'python'
        if subprocess.run([python, '-m', 'pip', 'install', '--quiet', '--disable-pip-version-check', TOOL], capture_output=True).returncode: return None
        try: done = subprocess.run([python, '-m', 'pip_audit', '--strict', '--no-deps', '--disable-pip', '--progress-spinner', 'off', '--timeout', '15', '--format', 'json', '-r', lock],
                                   capture_output=True, text=True, timeout=300)
        except subprocess.TimeoutExpired: return None
        return understood(done.stdout, done.returncode)


def differences(installed: dict, # name -> (version, its requirements)
                locked: dict     # name -> version
                ) -> list:       # sentences
    "Where the environment is not the lock"
    # what a locked package itself pins with == is as good as locked: torch names its CUDA libraries so
    implied = {n: v for k, (_, needs) in installed.items() if k in locked for n, v in pins(needs).items()}
    wrong = []
    for n, (version, _) in sorted(installed.items()):
        wanted = locked.get(n) or implied.get(n)
        if n in FREE and wanted is None: continue
        if wanted is None: wrong.append(f'{n} {version} is installed and is not in constraints.txt')
        elif version.partition('+')[0] != wanted.partition('+')[0]: wrong.append(f'{n} is {version} and constraints.txt says {wanted}')
    return wrong


def main():
    answer = asked()
    if answer:
        n, found = answer
        print(f'audit: pip-audit knows of {len(found)} vulnerabilities in the {n} packages of constraints.txt' + ''.join(f'\n  {f}' for f in found))
        return bool(found)
    installed = {name(d.metadata['Name']): (d.version, d.requires or []) for d in distributions() if d.metadata['Name'] and name(d.metadata['Name']) not in OURS}
    wrong = differences(installed, pins(LOCK.read_text().splitlines()))
    print(f'audit: pip-audit could not reach its service; of {len(installed)} installed packages {len(installed) - len(wrong)} are as constraints.txt has them' + ''.join(f'\n  {w}' for w in wrong))
    return bool(wrong)


if __name__ == '__main__': sys.exit(main())
