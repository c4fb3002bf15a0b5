"What pyproject.toml calls dynamic, read from settings.ini: the one place for metadata and requirements"
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

cfg = ConfigParser(delimiters='=')
cfg.read('settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']

setup(
    version=cfg['version'],
    description=cfg['description'],
    long_description=Path('README.md').read_text(encoding='utf-8') if Path('README.md').exists() else cfg['description'],
    long_description_content_type='text/markdown',
    author=cfg['author'],
    author_email=cfg['author_email'],
    license='Apache-2.0',
    keywords=cfg['keywords'].split(),
    classifiers=[f'Intended Audience :: {cfg["audience"]}', f'Natural Language :: {cfg["language"]}'],
    packages=[cfg['lib_name']],
    install_requires=cfg['requirements'].split(),
    extras_require={'dev': cfg['dev_requirements'].split()},
    entry_points={
        'console_scripts': [cfg['console_scripts']],
        # papermill imports its engines before it reads its arguments: the one place to complete them
        'papermill.engine': [f'{cfg["lib_name"]} = {cfg["lib_name"]}.papermill_hook']})
