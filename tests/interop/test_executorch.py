"""A network as an ExecuTorch program: its PyTorch and what is compiled of it compute what we do."""

import contextlib
import dataclasses
import importlib.util
import sys

import numpy as np
import pytest
import runs
import tiny
from weights import LLAMA4, NETWORKS, SMALL, changed, greedy, logits, random_leaves, random_tokens

from mobilellm_jax.errors import UserError
from mobilellm_jax.interop import executorch
from mobilellm_jax.interop.executorch import PROGRAM, export
from mobilellm_jax.leaves import nested
from mobilellm_jax.model.config import Stack
from mobilellm_jax.training.checkpoint import write_model

torch = pytest.importorskip("torch", reason="torch is not installed")
INSTALLED = importlib.util.find_spec("executorch") is not None
compiles = pytest.mark.skipif(not INSTALLED, reason="executorch is not installed")

PARTS = ((0, 9), (9, 10), (10, 17), (17, 20))  # of a text, as they are read
SHARED = NETWORKS["shared twice"]
ALL = (
    NETWORKS
    | {f"Llama 4, {name}": model for name, model in LLAMA4.items()}
    | {
        "ReLU": changed(mlp="relu", out_bias=True),
        "shared twice, one cache": dataclasses.replace(SHARED, ls_kv="first_pass"),
        "a pruned one, whose last block has no positions": changed(
            stacks=(
                Stack(2, 4, 2, 80),
                Stack(1, 2, 1, 33, repeats=2),
                Stack(1, 2, 2, 40, rope=False),
            ),
            qk_norm="unit",
        ),
    }
)
# Rows of 64 and 128, which groups divide.
QUANTISED = changed(width=64, stacks=(Stack(2, 4, 2, 128, repeats=2),), head_dim=16)


def ours(model, leaves, tokens_T):
    """Logits after each of `PARTS`."""
    ends = [end - 1 for _, end in PARTS]
    return np.asarray(logits(nested(leaves), model, tokens_T[None]))[0, ends]


def read(forward, tokens_T):
    """The same by a function of tokens and place."""
    with torch.no_grad():
        found = [
            forward(torch.from_numpy(tokens_T[None, begin:end]), torch.tensor([begin]))
            for begin, end in PARTS
        ]
    return np.concatenate([part.numpy().copy() for part in found])


@pytest.fixture(scope="module")
def operators():
    """ExecuTorch's operators, or what they compute."""
    if INSTALLED:
        from executorch.extension.llm.custom_ops import custom_ops

        yield custom_ops
        return
    library = torch.library.Library("llama", "DEF")
    library.define("update_cache(Tensor value, Tensor(a!) cache, SymInt at) -> Tensor")
    library.define(
        "custom_sdpa(Tensor q, Tensor k, Tensor v, SymInt at, Tensor? mask, float p, bool causal) -> Tensor"
    )

    def update_cache(new_1TKH, cache_1SKH, at):
        cache_1SKH[:, at : at + new_1TKH.shape[1]] = new_1TKH
        return torch.empty(1)

    def custom_sdpa(q_1TNH, k_1SKH, v_1SKH, at, mask, p, causal):
        assert causal and mask is None and p == 0
        end = at + q_1TNH.shape[1]
        visible_TS = torch.arange(end) <= torch.arange(at, end)[:, None]
        q, k, v = (x.transpose(1, 2) for x in (q_1TNH, k_1SKH[:, :end], v_1SKH[:, :end]))
        found = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=visible_TS, enable_gqa=True
        )
        return found.transpose(1, 2).contiguous()

    library.impl("update_cache", update_cache, "CPU")
    library.impl("custom_sdpa", custom_sdpa, "CPU")
    yield library
    library._destroy()


@pytest.mark.parametrize("name", ALL)
def test_the_network_in_pytorch(name, operators):
    model = ALL[name]
    leaves, tokens_T = random_leaves(model), random_tokens(model, length=20)[0]
    wanted = ours(model, leaves, tokens_T)
    assert wanted.std() > 0.3
    network = executorch.network(leaves, model, 32)
    np.testing.assert_allclose(read(network, tokens_T), wanted, atol=1e-4)


def test_eight_bits_are_those_of_ours(operators):
    """Of 8da8w and w8a8, but for numbers between two integers; and each is far from no rounding."""
    pytest.importorskip("qwix", reason="qwix is not installed")
    leaves, tokens_T = random_leaves(QUANTISED), random_tokens(QUANTISED, length=20)[0]
    exact = ours(QUANTISED, leaves, tokens_T)
    wanted = ours(dataclasses.replace(QUANTISED, quantization="w8a8"), leaves, tokens_T)
    got = read(executorch.network(leaves, QUANTISED, 32, "8da8w"), tokens_T)
    assert (got - wanted).std() < 0.2 * (wanted - exact).std()


@pytest.mark.parametrize("group", [32, 64])
def test_four_bits_in_groups(group, operators):
    from mobilellm_jax.interop.executorch_network import IntegerLinear

    torch.manual_seed(0)
    linear = torch.nn.Linear(128, 48, bias=False).requires_grad_(False)
    linear.weight[3] = 0
    found = IntegerLinear(linear, 4, group)
    assert found.integers.min() == -8 and found.integers.max() == 7
    rows, steps = linear.weight.unflatten(1, (-1, group)), found.scale[..., None]
    errors = (found.integers.unflatten(1, (-1, group)) * steps - rows).abs() / steps
    assert (
        errors.max() <= 1.01
    )  # at the positive end, whose integer is 7 and not 8; else half a step
    assert (errors > 0.51).float().mean() < 1.5 / group
    x = torch.randn(5, 128)
    wanted = x @ (found.integers.unflatten(1, (-1, group)) * steps).flatten(1).T
    assert (found(x) - wanted).abs().max() < 0.03 * wanted.std()  # 8 bits of x


class Program:
    """A program in ExecuTorch's runtime."""

    def __init__(self, folder):
        from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401
        from executorch.runtime import Runtime

        self.program = Runtime.get().load_program(folder / PROGRAM)
        self.method = self.program.load_method("forward")

    def forward(self, *given):
        return self.method.execute(given)[0]

    def fact(self, name):
        return self.program.load_method(name).execute(())[0]


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("quantization", executorch.QUANTIZATIONS)
def test_the_program(quantization, tmp_path):
    """Computes what its PyTorch does, to which the tests above hold."""
    leaves, tokens_T = random_leaves(QUANTISED), random_tokens(QUANTISED, length=20)[0]
    export(leaves, QUANTISED, tiny.tokenizer(), tmp_path / "out", quantization, 32)
    program = Program(tmp_path / "out")
    got = read(program.forward, tokens_T)
    exact = ours(QUANTISED, leaves, tokens_T)
    if quantization == "f32":
        np.testing.assert_allclose(got, exact, atol=1e-4)
    elif quantization == "f16":
        assert np.abs(got - exact).max() < 2e-2 * exact.std()
    else:
        wanted = read(executorch.network(leaves, QUANTISED, 32, quantization), tokens_T)
        # A number between two integers goes either way.
        assert (got - wanted).std() < 0.2 * (wanted - exact).std()
    assert program.fact("get_max_seq_len") == 32 and program.fact("use_kv_cache") is True


@compiles
@pytest.mark.slow
@pytest.mark.parametrize(("width", "bits", "group"), [(64, 8, None), (96, 4, 32), (64, 4, 64)])
def test_products_of_integers(width, bits, group):
    """Of the runtime: those of `IntegerLinear`."""
    from executorch.runtime import Runtime

    from mobilellm_jax.interop.executorch_network import IntegerLinear

    class Product(torch.nn.Module):
        def __init__(self):
            super().__init__()
            linear = torch.nn.Linear(width, 48, bias=False).requires_grad_(False)
            self.linear = IntegerLinear(linear, bits, group)

        def forward(self, tokens_1T, input_pos):
            x_TD = torch.cos(tokens_1T[0].float()[:, None] * torch.arange(1, width + 1))
            return self.linear(x_TD)[-1:]

    torch.manual_seed(0)
    product, given = Product(), (torch.tensor([[3, 5, 9]]), torch.tensor([0]))
    program = Runtime.get().load_program(executorch._lowered(product, 32, {}).buffer)
    found = program.load_method("forward").execute(given)[0]
    torch.testing.assert_close(found, product(*given), atol=1e-5, rtol=0)


@compiles
@pytest.mark.slow
def test_a_shared_block_is_in_the_file_once(tmp_path):
    sizes = {}
    for repeats in (1, 2):
        stack = Stack(2, 4, 2, 512, repeats=repeats)
        model = changed(width=128, stacks=(stack,), head_dim=32)
        export(random_leaves(model), model, tiny.tokenizer(), tmp_path / str(repeats))
        sizes[repeats] = (tmp_path / str(repeats) / PROGRAM).stat().st_size
    blocks = 4 * 2 * (128 * 128 * 3 + 128 * 512 * 3)
    assert blocks < sizes[1] < sizes[2] < sizes[1] + 0.1 * blocks


@compiles
@pytest.mark.slow
def test_the_runner_of_phones_writes_what_ours_writes(tmp_path):
    write_model(random_leaves(SMALL), SMALL, tiny.tokenizer(), {}, tmp_path / "run")
    given = f"--checkpoint={tmp_path}/run", "--to=executorch", f"--out={tmp_path}/out"
    ended = runs.program("mobilellm_jax.convert", *given, "--cache_length=48")
    assert ended.status == 0, ended
    assert "TextLLMRunner" in ended.out
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401
    from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner

    runner = TextLLMRunner(str(tmp_path / "out" / PROGRAM), str(tmp_path / "out/tokenizer.model"))
    pieces = []
    settings = GenerationConfig(max_new_tokens=12, temperature=0.0, num_bos=1, echo=False)
    runner.generate("some text", settings, pieces.append)
    tokenizer, model = tiny.tokenizer(), SMALL
    row = [tokenizer.bos_id, *tokenizer.encode("some text")]
    wanted = greedy(nested(random_leaves(model)), model, row, len(pieces))
    assert [tokenizer.pieces[i].replace("▁", " ") for i in wanted] == pieces


@contextlib.contextmanager
def installed(monkeypatch):
    """As if the package were."""
    with monkeypatch.context() as patch:
        patch.setattr(executorch, "_check_packages", lambda: None)
        yield


def test_what_is_refused(tmp_path, monkeypatch, operators):
    leaves, tokenizer, out = random_leaves(SMALL), tiny.tokenizer(), tmp_path / "out"
    with installed(monkeypatch):
        with pytest.raises(
            UserError, match="quantization='q8_0' is not one of f32, f16, 8da8w, 8da4w-32"
        ):
            export(leaves, SMALL, tokenizer, out, "q8_0")
        with pytest.raises(UserError, match="a cache of 65 tokens is not one of 2 to 64"):
            export(leaves, SMALL, tokenizer, out, slots=65)
        message = (
            r"stacks.0.layers.0.self_attn.q_proj has rows of 48 numbers, .* groups of 32 .* 8da8w"
        )
        with pytest.raises(UserError, match=message):
            export(leaves, SMALL, tokenizer, out, "8da4w-32")
        eight = dataclasses.replace(SMALL, quantization="w8a8")
        with pytest.raises(UserError, match=r"ExecuTorch cannot express .* have 8 bits"):
            export(leaves, eight, tokenizer, out)
        broken = leaves | {"embedding": np.full_like(leaves["embedding"], np.nan)}
        with pytest.raises(UserError, match=r"the weight model.embed_tokens.weight is not finite"):
            export(broken, SMALL, tokenizer, out)
    monkeypatch.setitem(sys.modules, "executorch", None)
    with pytest.raises(UserError, match=r"mobilellm-jax\[executorch\]"):
        export(leaves, SMALL, tokenizer, out)
    assert not list(tmp_path.iterdir())
