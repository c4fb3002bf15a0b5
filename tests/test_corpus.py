"Every bad input of the corpus ends in one clear sentence, and leaves nothing behind"
from collections import Counter

import corpus
import pytest


def test_the_corpus_is_what_it_says():
    names = Counter(c.name for c in corpus.CASES)
    assert len(names) == len(corpus.CASES) >= 200 and sum(c.kind == 'command' for c in corpus.CASES) >= 25


@pytest.mark.parametrize('kind', sorted({c.kind for c in corpus.IN_PROCESS}))
def test_a_bad_input_is_refused_in_one_sentence(kind):
    "In this process, by the functions that the commands call"
    problems = {c.name: problem for c in corpus.IN_PROCESS if c.kind == kind and (problem := corpus.run_case(c))}
    assert problems == {}


def test_a_command_on_a_bad_input_ends_in_one_sentence_and_leaves_the_reports_alone():
    problems = {c.name: problem for c in corpus.COMMANDS + corpus.STARTED if (problem := corpus.run_command(c, cold=c in corpus.COMMANDS[:3]))}
    assert problems == {}


def test_a_large_good_set_is_read_in_seconds(tmp_path):
    "100,000 rows are no reason to refuse"
    corpus.good_folder(tmp_path)
    (tmp_path / 'B.jsonl').write_text(corpus.jsonl(corpus.rows(100_000)))
    with corpus.within(60): items, info = corpus.load(tmp_path)
    assert len(items) == 100_006 and set(info['files']) == {'A.csv', 'B.jsonl'}
