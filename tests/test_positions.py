"""How long a sequence a body can read: found out without running it, and right about what happens where it is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rayward.batching import BatchSettings
from rayward.errors import DataError
from rayward.fitting import FitSettings, fit
from rayward.rendering import RenderSettings
from rayward.reward_model import ModelSettings
from rayward.reward_model.positions import readable, table_length, tell_length, trained_length
from rayward.scoring import Scorer
from rayward.training import TrainSettings
from tiny import byte_tokenizer, classifier, dataset_of, example, question

torch.set_num_threads(1)
TABLES = {"gpt2": 128, "bert": 128, "roberta": 159, "deberta-v2": 128}  # roberta: 160 rows, the first of which is padding's
COMPUTED = ["qwen3", "llama", "modernbert", "bloom"]


def run(kind: str, length: int, **changes: Any) -> None:
    model = classifier(kind, **changes).eval()
    with torch.inference_mode():
        model(input_ids=torch.full((1, length), 5), attention_mask=torch.ones(1, length, dtype=torch.long))


@pytest.mark.parametrize(("kind", "length"), TABLES.items())
def test_a_table_of_positions_ends_where_it_is_said_to(kind: str, length: int, capsys: pytest.CaptureFixture[str]) -> None:
    model = classifier(kind)
    assert table_length(model) == length
    run(kind, length)
    with pytest.raises((IndexError, RuntimeError)):
        run(kind, length + 1)
    tell_length(model, length)
    assert capsys.readouterr().err == ""
    tell_length(model, length + 1)
    assert f"render.max_length is {length} here and not {length + 1}" in capsys.readouterr().err
    assert (readable(model, length + 1), readable(model, length - 1)) == (length, length - 1)


@pytest.mark.parametrize("kind", COMPUTED)
def test_computed_positions_have_no_end_and_a_line_of_warning(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = classifier(kind)
    assert table_length(model) is None
    trained = trained_length(model)
    run(kind, 300)
    tell_length(model, trained or 10**9)
    assert capsys.readouterr().err == ""
    if trained is None:  # ALiBi
        return
    tell_length(model, trained + 1)
    assert readable(model, trained + 1) == trained + 1
    assert f"is more than the {trained:,} tokens this model was made for" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("scaling", "length"),
    [
        ({"rope_type": "default"}, 128),
        ({"rope_type": "linear", "factor": 4.0}, 512),
        ({"rope_type": "dynamic", "factor": 2.0}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),  # the config speaks of the whole already
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
            128,
        ),
    ],
    ids=lambda value: value["rope_type"] if isinstance(value, dict) else str(value),
)
def test_rotary_scaling_reaches_further(scaling: dict[str, Any], length: int) -> None:
    model = classifier("llama", rope_parameters={"rope_theta": 10000.0, **scaling})
    assert (table_length(model), trained_length(model)) == (None, length)


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_a_fit_and_its_scores_keep_to_the_positions_there_are(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classifier(kind, vocabulary=420).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    made = [example(f"yes {n}", f"no {n}", prompt=question(f"q {n}"), id=f"p{n}", targets=(1.0, 0.0), counts=(1, 1)) for n in range(20)]
    long = example("yes " * 200, "no", prompt=question("long"), id="long", targets=(1.0, 0.0), counts=(1, 1))
    dataset_of([*made, long], tmp_path / "pairs", "label_pairs")
    train = TrainSettings(lr=1e-3)
    settings = FitSettings(
        str(tmp_path / "pairs"), str(tmp_path / "model"), "bradley_terry", ModelSettings(), RenderSettings(), BatchSettings(4), train, 0.2
    )
    result = fit(settings, str(tmp_path / "fit"))
    assert "render.max_length is 128 here and not 2,048" in capsys.readouterr().err
    assert result.examples["rejected"] == 1
    scorer = Scorer.load(str(result.model))
    assert scorer.renderer.settings.max_length == 128
    with pytest.raises(DataError, match="too long"):
        scorer([long])
