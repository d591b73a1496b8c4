"""What several test modules share."""

from pathlib import Path

import pytest
import yaml

from tests.tiny_pair import make_pair, tiny_config


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pair, config.yaml, and the folder `run`: test_interruptions.py starts it, test_pipeline.py ends it."""
    folder = make_pair(tmp_path_factory.mktemp("tiny pair"))
    config = tiny_config(folder, folder / "run")
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return folder
