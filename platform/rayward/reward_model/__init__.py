"""Reward models: a Hugging Face sequence-classification model, read at the places a batch names.

    hidden_BTD  what the body says at every token         pooled_GKD  what is read at every place
    output_GKC  the head's answer, in float32             score_GK    what it comes to (heads.Reading)

    settings.py     which model, which head: net.*      loading.py    from a folder or the hub, and back
    bodies.py       what a body takes and does          head_choice.py  its own head, a fresh one, a language model's rows
    model.py        body and head, scores of groups     scratch.py    a small model and tokenizer from nothing
    overall.py      one score of several attributes   last_layer.py on the tokens that are read alone
    positions.py    how long a sequence may be

What is saved is a plain Hugging Face folder (config.json, model.safetensors, tokenizer): `AutoModelForSequenceClassification` loads
it, and gives the same score for one unpadded sequence where the pooling is the model's own. `config.json` carries a `rayward` entry:
pooling, rendering, temperature, what it was trained on.

What a body can do is found out by asking it, not by a list of names (`examine`): whether it is causal, and whether packed rows with a
shared prompt give the scores that separate sequences give.
"""

from rayward.reward_model.bodies import Traits, examine, use_segments
from rayward.reward_model.loading import Loaded, load_model, read_notes, register_tag, save_model
from rayward.reward_model.model import RewardModel, Seen, autocast, forget_verbosity, is_bf16, score_groups
from rayward.reward_model.overall import OVERALL, take_off
from rayward.reward_model.scratch import tiny_model, word_tokenizer
from rayward.reward_model.settings import SCALAR, ModelSettings

__all__ = [
    "OVERALL",
    "SCALAR",
    "Loaded",
    "ModelSettings",
    "RewardModel",
    "Seen",
    "Traits",
    "autocast",
    "examine",
    "forget_verbosity",
    "is_bf16",
    "load_model",
    "read_notes",
    "register_tag",
    "save_model",
    "score_groups",
    "take_off",
    "tiny_model",
    "use_segments",
    "word_tokenizer",
]
