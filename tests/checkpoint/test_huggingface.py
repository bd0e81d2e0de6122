"""Export: transformers gives our logits from our checkpoints, and SentencePiece's ids."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import sentencepiece
import torch
import transformers
from safetensors.torch import load_file
from sentencepiece import sentencepiece_model_pb2

from megaflow.checkpoint.huggingface import export, layer_order
from megaflow.checkpoint.shards import shards_of
from megaflow.checkpoint.store import CheckpointStore, open_checkpoint
from megaflow.checkpoint.tokenizer_export import export_tokenizer
from megaflow.config import ModelConfig
from megaflow.config_parallel import ParallelConfig
from megaflow.errors import UserError
from megaflow.kernels.dispatch import select_ops
from megaflow.model.init import initialise
from megaflow.model.llama import Llama
from megaflow.model.placement import placement
from megaflow.parallel.mesh import ParallelContext
from megaflow.tools.export import DtypeChoice
from megaflow.tools.export import export as export_command
from tests.distributed import run_ranks

TEXTS = (
    "Hello world",
    "",
    " ",
    "  two leading spaces, and trailing  ",
    "tabs\tand\n\nnew lines\r\n    indented\n",
    "今天天气很好，我们去公园散步吧。ＡＢＣ　全角",
    "mixed 中文 and English 3.14159, 1,000,000",
    "emoji 🙂👩‍💻🇨🇳, rare 𠮷 ཀ → ﬁ e\u0301",
    "Привет مرحبا こんにちは 안녕하세요 ñ",
    "def f(x):\n        return x ** 2  # 平方",
    "a" + " " * 17 + "b" + "=" * 33,
    "\u0000\ufffd\u200b",
)
CORPUS = [
    "the quick brown fox jumps over the lazy dog and then the dog sleeps in the sun",
    "def f(x):\n    return x  # a function of x",
    "今天天气很好，我们去公园散步吧。大语言模型发展很快，我们今天去公园。",
    "one, two, three: 1 2 3 4 5 6 7 8 9 0 (and so on) == the end",
]


def train_tokenizer(folder: Path, **options: object) -> Path:
    """A small SentencePiece model of LLaMA's kind."""
    defaults = {
        "model_type": "bpe",
        "vocab_size": 420,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
        "num_threads": 1,
        "minloglevel": 2,
        "hard_vocab_limit": False,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20), model_prefix=str(folder / "tokenizer"), **(defaults | options)
    )
    return folder / "tokenizer.model"


def config(vocab_size: int, tie_embeddings: bool) -> ModelConfig:
    return ModelConfig(
        hidden_size=32,
        intermediate_size=48,
        num_layers=11,
        num_heads=4,
        num_kv_heads=2,
        vocab_size=vocab_size,
        norm_eps=1e-4,
        rope_theta=5000.0,
        tie_embeddings=tie_embeddings,
        init_std=0.3,
    )


def build(model_config: ModelConfig, ctx: ParallelContext) -> Llama:
    model = Llama(model_config, ctx, select_ops("cpu", torch.float32))
    initialise(model, seed=3)
    return model


def save_model(run: Path, model_config: ModelConfig, tp: int) -> None:
    """A run directory with a checkpoint of a freshly initialised model."""
    ctx = ParallelContext.create(ParallelConfig(tp=tp), "cpu")
    parameters = dict(build(model_config, ctx).named_parameters())
    scalars = {
        "config": {
            "model": model_config.model_dump(mode="json") | {"weights": "/no/longer/there"},
            "train": {"precision": "bf16"},
            "data": {"seq_length": 64},
        }
    }
    moments = {name: torch.zeros_like(p) for name, p in parameters.items()}
    tensors = shards_of(placement(model_config, ctx), parameters, "model")
    tensors |= shards_of(placement(model_config, ctx), moments, "exp_avg")
    CheckpointStore(run / "checkpoints", ctx).save(5, tensors, scalars)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def run(tmp_path: Path, tokenizer: Path, request: pytest.FixtureRequest) -> Path:
    """A run saved by 2 x 2 ranks whose vocabulary does not divide evenly."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    vocab = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer)).vocab_size()
    run_ranks(4, save_model, folder, config(vocab + 1, getattr(request, "param", False)), 2)
    return folder


@pytest.mark.parametrize("run", [False, True], indirect=True, ids=["untied", "tied"])
def test_transformers_gives_our_logits(run: Path, tmp_path: Path) -> None:
    export_command(run, tmp_path / "out", dtype=DtypeChoice.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert theirs.dtype == torch.float32
    model_config = ModelConfig.model_validate(
        open_checkpoint(run / "checkpoints").manifest.scalars["config"]["model"] | {"weights": None}
    )
    ours = build(model_config, ParallelContext.single())
    tokens = torch.randint(0, model_config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(16).expand(2, 16)
    with torch.no_grad():
        expected = ours.logits(tokens, positions, torch.tensor([0, 16, 32], dtype=torch.int32), 16)
        error = (theirs(tokens).logits - expected).abs().max() / expected.abs().max()
    assert error < 1e-5
    names = {n: t for n, t in theirs.state_dict().items() if n in load_file(tmp_path / "out" / "model.safetensors")}
    checkpoint = open_checkpoint(run / "checkpoints")
    assert {f"model/{n}" for n in names} == {n for n in checkpoint.names() if n.startswith("model/")}
    assert all(torch.equal(checkpoint.read(f"model/{n}"), t) for n, t in names.items())
    assert theirs.config.tie_word_embeddings == model_config.tie_embeddings
    assert theirs.config.max_position_embeddings == 64
    assert theirs.generation_config.eos_token_id == 2


def test_the_whole_folder_and_generation(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    export_command(run, out)
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16, "the precision the run was trained in"
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    inputs = tokenizer("今天天气", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] > inputs["input_ids"].shape[1]
    ours = sentencepiece.SentencePieceProcessor(model_file=str(run / "tokenizer.model"))
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == [1, *ours.encode(text)], text
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    with pytest.raises(UserError, match="exists already"):
        export_command(run, out)


def test_several_files_with_an_index(run: Path, tokenizer: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(run / "checkpoints")
    shape = config(checkpoint.manifest.tensors["model/lm_head.weight"].shape[0], False)
    one, many = tmp_path / "one", tmp_path / "many"
    export(checkpoint, shape, tokenizer, one, max_positions=64, dtype=torch.float32)
    export(checkpoint, shape, tokenizer, many, max_positions=64, dtype=torch.float32, shard_bytes=70_000)
    index = json.loads((many / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in many.glob("*.safetensors"))
    assert len(files) > 2
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(t.nbytes for f in files for t in load_file(many / f).values())
    assert all((many / f).stat().st_size < 75_000 for f in files)
    a, b = (transformers.AutoModelForCausalLM.from_pretrained(p).state_dict() for p in (one, many))
    assert all(torch.equal(a[name], b[name]) for name in a)
    names = list(index["weight_map"])
    assert names == sorted(names, key=layer_order)
    assert names.index("model.layers.9.mlp.up_proj.weight") < names.index("model.layers.10.mlp.up_proj.weight")


def test_nothing_half_exported(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match=r"tokenizer\.model: not a SentencePiece model"):
        export_command(run, tmp_path / "out")
    (run / "tokenizer.model").unlink()
    with pytest.raises(UserError, match=r"no tokenizer\.model or tokenizer\.json"):
        export_command(run, tmp_path / "out")
    with pytest.raises(UserError, match="step-00000006"):
        export_command(run, tmp_path / "out", step=6)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def check_same_ids(model: Path, out: Path) -> None:
    ours = sentencepiece.SentencePieceProcessor(model_file=str(model))
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    for text in (*TEXTS, *CORPUS):
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == [1, *ids], text
        if ours.unk_id() not in ids:
            assert theirs.decode([1, *ids], skip_special_tokens=True) == ours.decode(ids), text
    assert (theirs.bos_token, theirs.eos_token, theirs.unk_token, theirs.pad_token) == ("<s>", "</s>", "<unk>", None)
    assert len(theirs) == ours.vocab_size()


def test_ids_are_sentencepieces(tokenizer: Path, tmp_path: Path) -> None:
    export_tokenizer(tokenizer, tmp_path)
    check_same_ids(tokenizer, tmp_path)


def test_ids_without_a_leading_space_or_byte_fallback(tmp_path: Path) -> None:
    model = train_tokenizer(tmp_path, add_dummy_prefix=False, byte_fallback=False, vocab_size=200)
    out = tmp_path / "out"
    out.mkdir()
    export_tokenizer(model, out)
    check_same_ids(model, out)


def test_normalising_models(tmp_path: Path) -> None:
    """SentencePiece's defaults: a character map, and no more than one space."""
    model = train_tokenizer(tmp_path, normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True)
    out = tmp_path / "out"
    out.mkdir()
    export_tokenizer(model, out)
    check_same_ids(model, out)


def test_demo_tokenizer(tmp_path: Path) -> None:
    model = Path(__file__).parents[2] / "configs" / "demo" / "tokenizer.model"
    export_tokenizer(model, tmp_path)
    check_same_ids(model, tmp_path)


def test_an_exported_tokenizer_exports_again(tokenizer: Path, tmp_path: Path) -> None:
    """A run may be on a tokenizer.json: it is copied and its special tokens are found."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    export_tokenizer(tokenizer, first)
    export_tokenizer(first / "tokenizer.json", second)
    assert not (second / "tokenizer.model").exists()
    check_same_ids(tokenizer, second)


def test_what_tokenizer_json_cannot_express_is_said(
    tokenizer: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    unigram = train_tokenizer(tmp_path, model_type="unigram", vocab_size=330)
    with pytest.raises(UserError, match="only SentencePiece models of type BPE"):
        export_tokenizer(unigram, out)
    symbols = train_tokenizer(tmp_path, user_defined_symbols=["Two"])
    with pytest.raises(UserError, match="gets other ids"):
        export_tokenizer(symbols, out)
    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    model.ParseFromString(tokenizer.read_bytes())
    model.pieces[300].score = model.pieces[301].score
    tied = tmp_path / "tied.model"
    tied.write_bytes(model.SerializeToString())
    with caplog.at_level(logging.WARNING):
        export_tokenizer(tied, out)
    assert "share a score" in caplog.text
