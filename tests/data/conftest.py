"""What tests of data share."""

import pytest
import tokenizer_files


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A folder with a tokenizer of each kind."""
    root = tmp_path_factory.mktemp("tokenizers")
    return {kind: make(root / kind) for kind, make in tokenizer_files.FOLDERS.items()}
