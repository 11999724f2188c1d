"""Training on your own data, optionally from a Qwen2.5 checkpoint: copy this file and change the names in capitals.

A JSONL row is {"text"}, {"prompt", "completion"} or {"messages"} (README, "Your own data"). Without changes a tiny
model with its own tokenizer trains on DATA within minutes on two cores.
"""

import dataclasses

from ml_collections import ConfigDict

from configs import miniature

DATA = "mydata"  # folder with articles*.jsonl and chats*.jsonl
HF = ""  # folder of a Hugging Face checkpoint: config.json, safetensors, tokenizer.json; convert it first (README)
SIZE = "0.5B"  # size of the checkpoint in HF
START = "runs/start"  # output of launch.convert for HF


def get_config() -> ConfigDict:
    config = miniature.get_config().unlock()
    config.name = "own_data"
    config.run_dir = "runs/own"
    articles = dict(format="jsonl", path=f"{DATA}/articles*.jsonl", component="articles", license="mine")
    chats = dict(format="jsonl", path=f"{DATA}/chats*.jsonl", component="chats", license="mine", family="chats")
    config.data.sources = ConfigDict(dict(articles=articles, chats=chats))
    config.data.update(dict(on_bad_row="skip", exact_duplicates="drop", near_duplicates="drop"))
    if HF:
        from stepdr_jax.models import sizes  # here: listing a config must not import jax

        shape = dataclasses.asdict(sizes.size(SIZE))
        config.tokenizer.update(dict(path=f"{HF}/tokenizer.json", vocab_size=shape.pop("vocab_size")))
        config.model.update(shape)
        config.initial_checkpoint = START
    # component -> share of tokens; changing one leaves the order within each component unchanged
    for stage in (config.midtrain1, config.midtrain2, config.sft):
        stage.mixture = ConfigDict(dict(articles=0.8, chats=0.2))
        stage.update(dict(steps=200, warmup_data="", warmup_data_steps=0))
        rate = 2e-5 if HF else 1e-3  # lower for a pretrained checkpoint
        stage.update(dict(learning_rate=rate, final_learning_rate=rate / 10))
    config.sft.mixture = ConfigDict(dict(chats=1.0))
    return config.lock()
