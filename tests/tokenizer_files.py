"""Folders with Hugging Face tokenizers of the three kinds that matter, small and made on the spot."""

import json
import pydoc_data.topics
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3_CHAT = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA2_CHAT = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}"
    "{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def texts() -> list[str]:
    """What the vocabularies are learned from."""
    return [*list(pydoc_data.topics.topics.values())[:40], "naïve 12345 中文 中文 👍👍 don't I'LL"]


def llama3_folder(path: Path, vocab_size: int = 600) -> Path:
    """Byte-level BPE that puts BOS in front; the special tokens have the last ids."""
    special = [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<|reserved_special_token_0|>",
    ]
    learned = _learned(_byte_level(LLAMA3_SPLIT), vocab_size - len(special))
    made = tokenizers.Tokenizer(models.BPE(*learned, ignore_merges=True))
    made.pre_tokenizer = _byte_level(LLAMA3_SPLIT)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(special)
    bos = special[0]
    made.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{bos} $A",
                pair=f"{bos} $A {bos}:1 $B:1",
                special_tokens=[(bos, made.token_to_id(bos))],
            ),
        ]
    )
    config = {
        "bos_token": bos,
        "chat_template": LLAMA3_CHAT,
        "clean_up_tokenization_spaces": True,  # as published, though it would lose spaces
        "eos_token": special[1],
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 4096,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    return _folder(path, made, config, {"bos_token": bos, "eos_token": special[1]})


def qwen2_folder(path: Path, vocab_size: int = 600) -> Path:
    """Byte-level BPE that composes characters first (NFC), knows no BOS and adds ordinary tokens."""
    special, ordinary = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ["<tool_call>", "<think>"]
    learned = _learned(_byte_level(QWEN2_SPLIT), vocab_size - len(special) - len(ordinary))
    made = tokenizers.Tokenizer(models.BPE(*learned))
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = _byte_level(QWEN2_SPLIT)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    made.add_special_tokens(special)
    made.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in ordinary])
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": None,
        "chat_template": CHATML,
        "clean_up_tokenization_spaces": False,
        "eos_token": special[0],
        "errors": "replace",
        "model_max_length": 4096,
        "pad_token": special[0],
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    return _folder(path, made, config, {"eos_token": special[0], "pad_token": special[0]})


def llama2_folder(path: Path, vocab_size: int = 600) -> Path:
    """BPE over characters with byte fallback, as converted from SentencePiece with a dummy prefix."""
    fixed = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    split = pre_tokenizers.Metaspace()
    vocab, merges = _learned(split, vocab_size, special_tokens=fixed)
    made = tokenizers.Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made.add_special_tokens(fixed[:3])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )

    def token(content: str) -> dict[str, object]:
        return {
            "__type": "AddedToken",
            "content": content,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
        }

    ends = {"bos_token": token("<s>"), "eos_token": token("</s>"), "unk_token": token("<unk>")}
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "chat_template": LLAMA2_CHAT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "tokenizer_class": "PreTrainedTokenizerFast",
        **ends,
    }
    plain = {name: {k: v for k, v in e.items() if k != "__type"} for name, e in ends.items()}
    return _folder(path, made, config, plain)


FOLDERS = {"llama3": llama3_folder, "qwen2": qwen2_folder, "llama2": llama2_folder}


def _byte_level(split: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _learned(
    split: pre_tokenizers.PreTokenizer, vocab_size: int, **options: object
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges, exactly `vocab_size` of them."""
    learner = tokenizers.Tokenizer(models.BPE())
    learner.pre_tokenizer = split
    alphabet = [] if "special_tokens" in options else pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False, **options
    )
    learner.train_from_iterator(texts(), trainer)
    model = json.loads(learner.to_str())["model"]
    assert len(model["vocab"]) == vocab_size
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def _folder(
    path: Path,
    tokenizer: tokenizers.Tokenizer,
    config: dict[str, object],
    special: dict[str, object],
) -> Path:
    """Writes the files as publishers do."""
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    added = json.loads(tokenizer.to_str())["added_tokens"]
    decoder = {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in added}
    for name, content in (
        ("tokenizer_config.json", {"added_tokens_decoder": decoder, **config}),
        ("special_tokens_map.json", special),
    ):
        (path / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return path


def byte_letters() -> dict[int, str]:
    """The letter that byte-level BPE writes for each byte: itself if it can be seen."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in seen]
    hidden = {byte: chr(256 + i) for i, byte in enumerate(others)}
    return {byte: chr(byte) for byte in seen} | hidden
