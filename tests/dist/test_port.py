"""Models that transformers has written, 4 and 5: imported, trained, exported, and loaded there again."""

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoTokenizer

from hyena_dist.cli.convert import main
from hyena_dist.config.schema import Config
from hyena_dist.config.sections.data import DataSection
from hyena_dist.config.sections.optim import OptimSection
from hyena_dist.config.sections.parallel import ParallelSection
from hyena_dist.config.sections.train import TrainSection
from hyena_dist.convert import read_model
from hyena_dist.data.tokenizer import encode
from hyena_dist.parallel.groups import init_groups
from hyena_dist.train.session import open_trainer
from tests.compare import rel
from tests.dist.harness import run_distributed
from tests.port import Port, trained_port

BY_4 = Path(__file__).parents[1] / "golden" / "port4"
"""Written by `python -m tests.port` with transformers 4.57.6."""
HEAD, TABLE = "lm_head.weight", "hyena.backbone.embeddings.word_embeddings.weight"
IDS = torch.randint(7, 11, (2, 250), generator=torch.Generator().manual_seed(0))
TOLERANCE = 1e-6


def _train(configs: list[Config]) -> None:
    for config in configs:
        groups = init_groups(tensor=config.parallel.tensor)
        with open_trainer(config, groups, torch.device("cpu")) as trainer:
            trainer.fit()


@pytest.fixture(scope="module")
def directories(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of each version a directory with what it wrote (source), the run from it (run), and its export (back)."""
    found, configs = {}, []
    for version, shard_size in (("4", None), ("5", "5GB"), ("5 in shards", "8KB")):
        directory = found[version] = tmp_path_factory.mktemp("port")
        if shard_size is None:
            (directory / "source").symlink_to(BY_4)
        else:
            trained_port().save_pretrained(directory / "source", max_shard_size=shard_size)
        assert main([str(directory / "source"), str(directory / "start"), "--to", "checkpoint"]) == 0
        section, _, _ = read_model(directory / "start")
        assert not section.tie_embeddings
        configs.append(Config(
            model=section, data=DataSection(shards=str(shards), seq_len=250, num_workers=0),
            train=TrainSection(run_dir=str(directory / "run"), resume=f"weights:{directory}/start", steps=3,
                               micro_batch_size=2, global_batch_size=2, eval_every=0, save_every=3),
            optim=OptimSection(lr=1e-3, warmup_steps=0), parallel=ParallelSection(tensor=2)))
    run_distributed(_train, 2, configs, timeout=300)
    for directory in found.values():
        assert main([str(directory / "run"), str(directory / "back"), "--to", "huggingface"]) == 0
    return found


def test_both_versions_are_tested(directories: dict[str, Path]) -> None:
    assert transformers.__version__.startswith("5."), "what is written live"
    assert '"transformers_version": "4.' in (BY_4 / "config.json").read_text()
    shards = list((directories["5 in shards"] / "source").glob("model-*-of-*.safetensors"))
    assert len(shards) > 2
    assert not (directories["5 in shards"] / "source" / "model.safetensors").exists()


@pytest.mark.parametrize("version", ["4", "5", "5 in shards"])
def test_there_and_back(directories: dict[str, Path], version: str) -> None:
    directory = directories[version]
    with torch.no_grad():
        expected = Port.from_pretrained(directory / "source").eval()(IDS)
        assert rel(read_model(directory / "source")[1](IDS), expected) < TOLERANCE
        section, trained, _ = read_model(directory / "run")
        back, said = Port.from_pretrained(directory / "back", output_loading_info=True)
        logits = back.eval()(IDS)
        error = rel(logits, trained(IDS))
        print(f"transformers {version}: after three steps, logits differ by {error:.1e}, tolerance {TOLERANCE}")
        assert error < TOLERANCE
        assert not any(said[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), said
        assert rel(logits, expected) > 1e-3, "control: it was trained"
        back.lm_head.weight.copy_(back.hyena.backbone.embeddings.word_embeddings.weight)
        assert rel(back(IDS), trained(IDS)) > 1e-1, "control: the head is not the embedding"
    before, after = (dict(Port.from_pretrained(directory / name).state_dict()) for name in ("source", "back"))
    for key in (HEAD, TABLE):
        assert not torch.equal(before[key], after[key]), f"{key} was trained"
    assert not section.tie_embeddings


def test_the_export_has_the_published_tokenizer(directories: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directories["4"] / "back", trust_remote_code=False)
    sequence = "ACGTNacgtnURYx.- "
    ids = tokenizer(sequence)["input_ids"]
    assert ids == [*encode(sequence).tolist(), 1], "as this package reads it, and [SEP]"
    assert tokenizer(sequence, add_special_tokens=False)["input_ids"] == encode(sequence).tolist()
    assert tokenizer(["ACGT", "A"], padding=True)["input_ids"] == [[7, 8, 9, 10, 1], [4, 4, 4, 7, 1]]
    assert tokenizer("AC", "G")["input_ids"] == [7, 8, 1, 9, 1]
    assert len(tokenizer("A" * 300, truncation=True)["input_ids"]) == tokenizer.model_max_length == 254
    assert tokenizer.decode([7, 8, 9, 10, 11, 1], skip_special_tokens=True) == "ACGTN"
    special = {kind: tokenizer.convert_tokens_to_ids(token) for kind, token in tokenizer.special_tokens_map.items()}
    assert special == {"cls_token": 0, "sep_token": 1, "eos_token": 1, "bos_token": 2, "mask_token": 3, "pad_token": 4,
                       "unk_token": 6}
    assert tokenizer("A[MASK]C")["input_ids"] == [7, 3, 8, 1]
    model = Port.from_pretrained(directories["4"] / "back")
    assert model(**tokenizer(["ACGT"], return_tensors="pt")).shape == (1, 5, 16), "it takes what the tokenizer gives"


def test_what_was_tied_stays_tied(directories: dict[str, Path], tmp_path: Path) -> None:
    """The port stores the head of every model: one that is the embedding is not a weight of its own."""
    model = Port.from_pretrained(directories["5"] / "source")
    with torch.no_grad():
        model.lm_head.weight.copy_(model.hyena.backbone.embeddings.word_embeddings.weight)
    model.save_pretrained(tmp_path / "tied")
    assert HEAD in load_file(tmp_path / "tied" / "model.safetensors")
    assert read_model(tmp_path / "tied")[0].tie_embeddings
