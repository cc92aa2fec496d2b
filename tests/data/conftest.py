"""What tests of data share."""

import dataclasses

import chats
import pytest
import tokenizer_files

from mobilellm_jax.data.tokenizers import Tokenizer


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A folder with a tokenizer of each kind."""
    root = tmp_path_factory.mktemp("tokenizers")
    return {kind: make(root / kind) for kind, make in tokenizer_files.FOLDERS.items()}


@pytest.fixture(params=chats.STYLES)
def style(request, folders):
    """A tokenizer with a template, and the parts of its text by hand."""
    template, by_hand, kind = chats.STYLES[request.param]
    return dataclasses.replace(Tokenizer.load(folders[kind]), chat_template=template), by_hand
