"""Your own data and, if you have one, a Qwen2.5 checkpoint of Hugging Face: copy this file and change the capital names.

A row of JSONL is {"text"}, {"prompt", "completion"} or {"messages"} (README, "Your own data"). As it stands a tiny model with a
tokenizer of its own learns from DATA within minutes on two cores.
"""

import dataclasses

from ml_collections import ConfigDict

from configs import miniature

DATA = "mydata"  # folder with articles*.jsonl and chats*.jsonl
HF = ""  # a folder with config.json, safetensors and tokenizer.json; convert it first (README)
SIZE = "0.5B"  # of the checkpoint in HF
START = "runs/start"  # what launch.convert made of HF


def get_config() -> ConfigDict:
    config = miniature.get_config().unlock()
    config.name = "own_data"
    config.run_dir = "runs/own"
    articles = dict(format="jsonl", path=f"{DATA}/articles*.jsonl", component="articles", license="mine")
    chats = dict(format="jsonl", path=f"{DATA}/chats*.jsonl", component="chats", license="mine", family="chats")
    config.data.sources = ConfigDict(dict(articles=articles, chats=chats))
    config.data.update(dict(on_bad_row="skip", exact_duplicates="drop", near_duplicates="drop"))
    if HF:
        from stepdr_jax.models import sizes  # here: a config is listed without jax

        shape = dataclasses.asdict(sizes.size(SIZE))
        config.tokenizer.update(dict(path=f"{HF}/tokenizer.json", vocab_size=shape.pop("vocab_size")))
        config.model.update(shape)
        config.initial_checkpoint = START
    # component -> share of tokens; changing a number mixes anew and leaves every component's own order as it is
    for stage in (config.midtrain1, config.midtrain2, config.sft):
        stage.mixture = ConfigDict(dict(articles=0.8, chats=0.2))
        stage.update(dict(steps=200, warmup_data="", warmup_data_steps=0))
        rate = 2e-5 if HF else 1e-3  # what is trained already must not be shaken
        stage.update(dict(learning_rate=rate, final_learning_rate=rate / 10))
    config.sft.mixture = ConfigDict(dict(chats=1.0))
    return config.lock()
