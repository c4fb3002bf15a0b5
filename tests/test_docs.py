"What readers see first is made from the notebooks and is current"
import re

import nbformat

from medpeft_study.site import readme_text
from medpeft_study.study import STUDIES, run_config


def test_readme_is_the_index_notebook(root):
    "`make readme` writes it"
    assert (root / 'README.md').read_text(encoding='utf-8') == readme_text(root / 'nbs' / 'index.ipynb')


def test_every_command_in_the_readme_names_parameters_that_exist(root):
    "Each papermill line of the README resolves to a run"
    lines = re.findall(r'papermill nbs/run\.ipynb([^`\n]*)', (root / 'README.md').read_text(encoding='utf-8'))
    assert len(lines) >= 5
    for line in lines:
        params = dict(re.findall(r'-p (\w+) (\S+)', line))
        params = {k: float(v) if re.fullmatch(r'[\d.e-]+', v) and k == 'lr' else int(v) if v.isdigit() else v for k, v in params.items()}
        if params.get('dataset_path') == 'my_folder': del params['dataset_path'] # the reader's own
        run_config(params)


def test_every_study_resolves():
    for name, study in STUDIES.items():
        for params in study.runs: run_config(params | dict(study=name))


def test_no_notebook_shows_a_path_of_a_machine_or_a_saved_error(root):
    for path in sorted((root / 'nbs').glob('*.ipynb')):
        for cell in nbformat.read(path, 4).cells:
            for output in cell.get('outputs', []):
                assert output.output_type != 'error', path.name
                assert not re.search(r'/(root|home|work|tmp|Users)/', str(output)), f'{path.name}: {str(output)[:300]}'


def test_no_notebook_holds_the_state_of_a_widget(root):
    "It is another at every execution, and a reader without a kernel sees nothing of it"
    for path in sorted((root / 'nbs').glob('*.ipynb')): assert 'application/vnd.jupyter.widget' not in path.read_text(encoding='utf-8'), path.name
