"""The model that MLflow loads: this file is logged as it stands (models from code), the weights lie beside it as safetensors.

    model = mlflow.pyfunc.load_model("models:/toy-pairs@champion")
    model.predict(pandas.DataFrame({"prompt": ["largest of 13 27 15 ?"], "answer": ["13 and 27 keep 27\\n..."]}))

Rows hold `prompt` (a text, or JSON of chat messages) and `answer`, or `steps` (the answer in pieces) for models that score steps. Out
come `score`, `probability` (calibrated: of being right where the model learned outcomes or steps; else 0.5 is an average answer only
by convention, and differences of scores are what is calibrated), `step_scores`, and `member_scores`: what each head of a model with
several says of the answer (of its last step).
"""

from __future__ import annotations

import json
from typing import Any

from mlflow.models import set_model
from mlflow.pyfunc import PythonModel


class RewardModelPyfunc(PythonModel):
    """Rows of prompts and answers in, scores out, through the code that trained the model."""

    def load_context(self, context: Any) -> None:
        """Load the weights that lie beside this file."""
        from rayward.scoring import Scorer

        self.scorer = Scorer.load(context.artifacts["model"])

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]  # MLflow acts on type hints here
        """One row out per row in; a row that cannot be scored is an error that says which and why."""
        import pandas as pd

        from rayward.errors import DataError
        from rayward.formats.own import rollouts
        from rayward.metrics import sigmoid
        from rayward.records import BadRecord, Rejected

        read = []
        for number, row in enumerate(pd.DataFrame(model_input).to_dict("records")):
            steps = row.get("steps")
            row = {
                "prompt": _prompt(row.get("prompt")),
                "answer": row.get("answer"),
                "steps": None if steps is None else list(steps),
            }
            try:
                read += rollouts(row, f"row-{number}")
            except BadRecord as error:
                raise DataError(f"row {number} cannot be scored: {error}") from None
        by_member = []
        for number, score_KM in enumerate(self.scorer.score_by_member(read)):
            if isinstance(score_KM, Rejected):
                raise DataError(f"row {number} cannot be scored: {score_KM.reason}")
            by_member.append(score_KM)
        scores = [score_KM.mean(-1).tolist() for score_KM in by_member]
        final = [score[-1] for score in scores]
        return pd.DataFrame(
            {
                "score": final,
                "probability": [float(sigmoid(s / self.scorer.temperature)) for s in final],
                "step_scores": [s if self.scorer.reads_steps else [] for s in scores],
                "member_scores": [s[-1].tolist() if self.scorer.members > 1 else [] for s in by_member],
            }
        )


def _prompt(prompt: Any) -> Any:
    """A text, or the chat messages that its JSON holds."""
    if isinstance(prompt, str) and prompt.lstrip().startswith("[{"):
        try:
            return json.loads(prompt)
        except ValueError:
            return prompt
    return prompt


set_model(RewardModelPyfunc())
