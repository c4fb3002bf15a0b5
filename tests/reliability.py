"""Join what torture.py, corpus.py and fuzz.py wrote into reports/reliability.json, and say what did not go as it must.

    python tests/reliability.py build/torture

`make torture` runs all four."""
import argparse
import sys
from pathlib import Path

from medpeft_study.config import project_root
from medpeft_study.reliability import ReliabilityError, faults, join_reliability


def main() -> int: # exit status: 1 if something did not go as it must, 2 if there is nothing to join
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('folder', type=Path, help='where torture.json, corpus.json and fuzz*.json lie')
    parser.add_argument('--out', type=Path, default=project_root() / 'reports' / 'reliability.json')
    args = parser.parse_args()
    try: found = join_reliability(args.folder, args.out)
    except ReliabilityError as e: print(e, file=sys.stderr); return 2
    missing = [p for p in ('torture.json', 'corpus.json', 'fuzz-record.json', 'fuzz-dataset.json') if not (args.folder / p).is_file()]
    if missing: print(f'Not measured this time: {", ".join(missing)}; see the lines above.', file=sys.stderr)
    for sentence in (wrong := faults(found)): print(sentence, file=sys.stderr)
    print(f'{args.out} holds {", ".join(found)}.')
    return int(bool(wrong or missing))


if __name__ == '__main__': sys.exit(main())
