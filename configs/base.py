"""Every field of a config: its default, the rule for its values, and its meaning, unit or source. docs/configuration.md
is made from this file.

The other files of this folder start from `get_config()` and change values. Defaults are those of the miniature
(configs/miniature.py); one without a source is ours, chosen by measurement at that size. "Paper" is Step-DeepResearch
(arXiv 2512.20491), "ORZ" is Open-Reasoner-Zero (arXiv 2503.24290).
"""

from ml_collections import ConfigDict

from stepdr_jax import configuration
from stepdr_jax.configuration import (
    DATE,
    DIRECTORY,
    ENTRY,
    FLAG,
    FRACTION,
    LOW_HIGH,
    MIXTURE_SCHEDULE,
    NUMBER,
    POSITIVE_FRACTION,
    STEP_RANGE,
    TEXT,
    URLS,
    above,
    at_least,
    even,
    field,
    one_of,
    section,
)
from stepdr_jax.runtime import stages

REMAT = ("none", "layer", "attention", "offload")  # models.qwen2.REMAT
DTYPE = one_of("float32", "bfloat16")

TRAINING_GUARD = section(
    "When an update is skipped and when training rolls back",
    norm_factor=field(10.0, at_least(0), "skip a gradient norm above so many times its running mean; 0 = never"),
    norm_window=field(100, above(0), "steps of that mean; no step is skipped before it has seen so many"),
    loss_rise=field(1.5, at_least(0), "nats per token above the mean of the same sources: a spike; 0 = never"),
    loss_window=field(5, above(0), "log rows of that mean; a source is not judged before it has so many"),
    max_skips=field(5, above(0), "skipped steps in one log interval that make training roll back"),
    max_rollbacks=field(3, at_least(0), "rollbacks before the stage stops; 0 = log only. PaLM: about 20"),
)
STAGE = dict(
    seq_len=field(256, above(0), "tokens per sequence"),
    batch_size=field(8, above(0), "sequences per step (miniature: small batches learn to copy from fewer tokens)"),
    steps=field(100, above(0), "optimizer steps"),
    learning_rate=field(2.5e-3, above(0), "peak (miniature: at twice this, copying is never learned)"),
    final_learning_rate=field(2.5e-4, at_least(0), "at the last step"),
    warmup_steps=field(50, at_least(0), "steps of linear warmup"),
    schedule=field("wsd", one_of("wsd", "cosine", "constant"), "wsd: warmup, stable, decay; all schedules warm up"),
    decay_share=field(0.3, FRACTION, "wsd: last part of training, over which the rate falls"),
    weight_decay=field(0.01, at_least(0)),
    beta2=field(0.95, POSITIVE_FRACTION, "of Adam"),
    clip_norm=field(1.0, above(0), "global norm of the gradient"),
    z_loss=field(1e-4, at_least(0), "weight of the squared log-partition, which keeps logits small (PaLM); 0 = off"),
    loss_chunk=field(2048, above(0), "tokens per slice of the vocabulary loss"),
    checkpoint_every=field(100, above(0), "steps"),
    keep_checkpoints=field(2, above(0), "newest checkpoints"),
    log_every=field(10, above(0), "steps"),
    heldout_sequences=field(8, at_least(0), "sequences of each component that are never trained on; 0 = none"),
    heldout_every=field(200, at_least(0), "steps between their losses, and at the end; 0 = never"),
    microbatches=field(1, above(0), "parts of a batch whose gradients are summed; must divide batch_size"),
    guard=TRAINING_GUARD,
    trajectory_loss=field("all", one_of("all", "assistant"), "tokens of trajectories that carry loss"),
    mixture=field({}, at_least(0), "component -> rate; the paper's Tables 1 and 2 print no rates"),
    mixture_schedule=field((), MIXTURE_SCHEDULE, "from that step on these rates; other components keep theirs"),
    warmup_data=field("", TEXT, "the only component of the first warmup_data_steps steps; empty = none"),
    warmup_data_steps=field(0, at_least(0), "steps that read warmup_data only"),
)

FIELDS = section(
    "The run",
    name=field("base", TEXT, "shown in logs and reports"),
    run_dir=field("runs/base", DIRECTORY, "everything the run writes; delete it to start over"),
    config_file=field("", TEXT, "the file given as --config; set by the commands, decides nothing"),
    seed=field(0, NUMBER, "training seed: initialization, data order, sampling"),
    data_seed=field(0, NUMBER, "offline web, tasks, trajectories and splits; shared by all training seeds"),
    initial_checkpoint=field("", TEXT, "folder from launch.convert that first_stage starts from; empty = random"),
    first_stage=field("midtrain1", one_of(*stages.trained()), "midtrain2 or sft leave out what comes before"),
    offline_web=section(
        "Pages that the agent can search and read",
        documents=field("", TEXT, "folder of your own md, html, txt and pdf documents, added to the built-in pages"),
        as_of=field("2026-06-01", DATE, "the date the agent is told; the built-in pages are dated before it"),
        heldout_share=field(0.2, FRACTION, "entities whose questions appear in no training data"),
    ),
    tools=section(
        "The tool host and its limits",
        address=field("", TEXT, "host:port of a running tool host; empty = start one on a free loopback port"),
        token_env=field("STEPDR_TOOLS_TOKEN", TEXT, "environment variable with its bearer token, if it needs one"),
        tls_ca=field("", TEXT, "PEM file of the authority of its certificate; empty = no TLS"),
        topk=field(2, above(0), "passages per search query when the agent names no number"),
        max_observation_chars=field(700, above(0), "longer tool results are stored; a summary and path are returned"),
        fetch_timeout=field(2.0, above(0), "seconds for one page"),
        call_timeout=field(15.0, above(0), "seconds for one tool call, retries included"),
        concurrency=field(32, above(0), "calls of one tool at a time; further calls answer RESOURCE_EXHAUSTED"),
    ),
    agent=section(
        "Budgets of an episode",
        prompt=field("compact", one_of("compact", "full"), "tens of tokens, or JSON schemas of every tool"),
        max_turns=field(6, above(0), "paper: 30"),
        max_turn_tokens=field(96, above(0), "tokens of an assistant turn; paper: 16K"),
        max_episode_tokens=field(640, above(0), "tokens with prompt and observations; paper: 128K"),
        max_tool_calls=field(6, above(0), "calls per episode, enforced by the tool host"),
        wall_seconds=field(120.0, above(0), "longer episodes are masked, not punished"),
    ),
    teacher=section(
        "Who writes the demonstrations",
        endpoint=field("", TEXT, "OpenAI-compatible base URL; empty = the scripted expert, offline"),
        model=field("", TEXT, "model name at the endpoint"),
        api_key_env=field("OPENAI_API_KEY", TEXT, "environment variable that holds the key"),
    ),
    synthesis=section(
        "Tasks and trajectories",
        tasks_per_entity=field(14, above(0), "training tasks for one entity, over all kinds"),
        heldout_tasks=field(240, at_least(0), "evaluation tasks"),
        chinese_share=field(0.2, FRACTION, "of tasks"),
        kind_weights=field(
            dict(fact=0.55, deep_search=0.15, verification=0.1, report=0.2), at_least(0), "kind of task -> weight"
        ),
        noise_share=field(0.08, FRACTION, "trajectories with a tool error or empty result and its recovery"),
        max_reflections=field(3, at_least(0), "paper section 3.3: at most three"),
        seed_degree=field((3, 10), LOW_HIGH, "degree of a seed entity (paper section 3.2)"),
        subgraph_nodes=field((10, 40), LOW_HIGH, "paper section 3.2"),
        super_node_degree=field(1000, above(0), "larger nodes are leaves (paper section 3.2)"),
        episode_concurrency=field(16, above(0), "expert episodes at once"),
        document_copies=field(6, at_least(0), "renamed copies of each passage in the mid-training documents"),
        trajectory_copies=field(6, at_least(0), "renamed copies of each trajectory in mid-training II and SFT"),
    ),
    data=section(
        "Training data beside what launch.synthesize writes",
        sources=field(
            {}, ENTRY, "name -> dict(format, path, component, capability, lang, license, family); see own_data.py"
        ),
        shard_mib=field(256.0, above(0), "MiB of source text in one ArrayRecord file"),
        on_bad_row=field("stop", one_of("stop", "skip"), "a source row that cannot be read; skipped rows are counted"),
        on_damage=field("stop", one_of("stop", "skip"), "a damaged shard in training; skipped rows become padding"),
        exact_duplicates=field("count", one_of("off", "count", "drop"), "in a component; copies differ in a word"),
        near_duplicates=field("off", one_of("off", "count", "drop"), "renamed copies are near duplicates on purpose"),
        evaluation_sets=field({}, ENTRY, "name -> file of questions that no training row may hold"),
        contaminated=field("drop", one_of("count", "drop"), "rows that hold such a question"),
    ),
    tokenizer=section(
        "Byte-level BPE",
        path=field("", TEXT, "tokenizer.json to use, e.g. Qwen2.5's; empty = train one on the corpus"),
        vocab_size=field(768, at_least(300), "256 bytes and the control tokens included; Qwen2.5: 151,665"),
    ),
    log=section(
        "Writers beside metrics.jsonl",
        tensorboard=field(False, FLAG, "event files in each stage's folder"),
        wandb_project=field("", TEXT, "project of Weights & Biases (pip install wandb); empty = off"),
    ),
    profile=section(
        "Traces of jax's profiler",
        steps=field((0, 0), STEP_RANGE, "first and last step of a trace; (0, 0) = no trace is planned"),
        length=field(3, above(0), "steps of a trace requested while training runs (runtime/profiling.py)"),
    ),
    model=section(
        "Architecture of Qwen2.5",
        hidden_size=field(64, above(0)),
        num_layers=field(2, above(0), "copying needs two; a third delays it (docs/benchmarks.md)"),
        num_heads=field(2, above(0)),
        num_kv_heads=field(2, above(0), "must divide num_heads; with fewer, a tiny model copies late"),
        head_dim=field(32, even, "rotary halves"),
        intermediate_size=field(192, above(0)),
        rope_theta=field(1e6, above(0), "Qwen2.5"),
        rms_norm_eps=field(1e-6, above(0), "Qwen2.5"),
        tie_embeddings=field(True, FLAG, "as Qwen2.5 0.5B to 3B"),
        dtype=field("float32", DTYPE, "of activations"),
        param_dtype=field("float32", DTYPE, "of parameters"),
        yarn_factor=field(1.0, above(0), "above 1: YaRN stretches original_context by this factor"),
        original_context=field(32768, above(0), "tokens; Qwen2.5's trained length"),
    ),
    mesh=section(
        "Devices along each axis of the mesh",
        data=field(1, above(0), "copies of the model"),
        fsdp=field(1, above(0), "shards of parameters, and of the batch"),
        context=field(1, above(0), "shards of a sequence"),
        tensor=field(1, above(0), "shards of heads and of hidden units"),
    ),
    checkpointing=section(
        "Where checkpoints go",
        directory=field("", TEXT, "folder, gs:// or s3:// path for seed<k>/<stage>/...; empty = in run_dir"),
        background=field(True, FLAG, "training continues while a checkpoint is written"),
        keep_every=field(0, at_least(0), "steps; checkpoints at its multiples are never deleted; 0 = none"),
    ),
    watchdog=section(
        "Steps that hang",
        factor=field(20.0, at_least(0), "dump all stacks after so many median step times without a step; 0 = never"),
        floor_seconds=field(600.0, above(0), "seconds to wait at least"),
        first_seconds=field(3600.0, above(0), "for the first steps, which compile"),
        exit=field(False, FLAG, "then exit with status 75, so that a cluster restarts the run"),
    ),
    distributed=section(
        "Processes of one run",
        coordinator=field(
            "", TEXT, "host:port of process 0; auto = jax asks TPU VM, GKE or Slurm; empty = one process"
        ),
        processes=field(1, above(0), "how many, when coordinator is a host:port"),
        process=field(0, at_least(0), "which of them this is"),
        join_seconds=field(300.0, above(0), "for the others to start; jax's default"),
        heartbeat_seconds=field(100.0, above(0), "a process silent for so long is dead and all end; jax's default"),
    ),
    parallel=section(
        "How training is computed on the mesh",
        context_strategy=field(
            "auto", one_of("auto", "ring", "all_gather", "ulysses"), "attention across mesh.context"
        ),
        zigzag=field(True, FLAG, "a context shard has an early and a late piece, so that causal work is equal"),
        attention=field(
            "auto",
            one_of("auto", "reference", "prefix", "blockwise", "splash", "cudnn"),
            "splash is for TPUs, cudnn for GPUs; auto = by device",
        ),
        remat=field(
            "none",
            one_of(*REMAT),
            "recomputed in the backward pass. layer: all but a layer's input; attention: all but its input and its "
            "attention; offload: as layer, inputs wait in host memory",
        ),
        vocab_tiles=field(1, above(0), "slices of the unembedding, one on a chip at a time; rounded to a divisor"),
    ),
    midtrain1=section("Mid-training I", **STAGE),
    midtrain2=section("Mid-training II", **STAGE),
    sft=section("Supervised fine-tuning", **STAGE),
    ppo=section(
        "Reinforcement learning",
        iterations=field(60, above(0)),
        prompts_per_iteration=field(32, above(0), "tasks; ORZ: 128"),
        samples_per_prompt=field(2, above(0), "episodes per task; ORZ: 64"),
        gamma=field(1.0, POSITIVE_FRACTION, "paper"),
        gae_lambda=field(1.0, POSITIVE_FRACTION, "paper"),
        clip=field(0.2, above(0), "of the probability ratio; ORZ"),
        dual_clip=field(
            0.0, at_least(0), "above 1: bounds the loss of actions with negative advantage; 0 = off; verl: 3"
        ),
        value_clip=field(0.2, above(0), "ORZ"),
        actor_learning_rate=field(3e-4, above(0), "ORZ: 1e-6 at 32B"),
        critic_learning_rate=field(1e-3, above(0), "ORZ: 5e-6"),
        warmup_steps=field(5, at_least(0), "optimizer steps"),
        actor_minibatches=field(1, above(0), "updates per iteration; ORZ: 1"),
        critic_minibatches=field(4, above(0), "updates per iteration; ORZ: 12"),
        critic_warmup_iterations=field(3, at_least(0), "first iterations, which train only the critic"),
        kl_coefficient=field(0.0, at_least(0), "ORZ"),
        entropy_coefficient=field(0.0, at_least(0), "ORZ"),
        loss_aggregation=field("token_mean", one_of("token_mean", "seq_mean", "seq_sum"), "ORZ"),
        whiten=field(True, FLAG, "advantages to mean 0 and deviation 1; ORZ"),
        temperature=field(1.0, at_least(0), "ORZ"),
        clip_norm=field(1.0, above(0), "global norm of the gradient; ORZ"),
        beta2=field(0.95, POSITIVE_FRACTION, "of Adam; ORZ"),
        truncated_reward=field(
            "worst", one_of("worst", "zero"), "reward of an episode without an answer; worst: every flaw, no merit"
        ),
        max_masked_share=field(0.3, POSITIVE_FRACTION, "above it the iteration is sampled again, then the run stops"),
        checkpoint_every=field(5, above(0), "iterations"),
        keep_checkpoints=field(2, above(0), "newest checkpoints"),
        staleness=field(0, one_of(0, 1), "1: one step off-policy: sample while the learner trains; needs tis_cap"),
        tis_cap=field(0.0, at_least(0), "bound of truncated importance sampling weights, trainer / sampler; 0 = off"),
        microbatch_sequences=field(1, above(0), "sequences of agent.max_episode_tokens in one forward and backward"),
        remat=field("none", one_of(*REMAT), "as parallel.remat"),
        guard=section(
            "Limits of an iteration; 0 = no limit. A healthy miniature stays far within (docs/ppo.md)",
            max_kl=field(0.1, at_least(0), "nats per token between the policies before and after"),
            min_entropy=field(0.02, at_least(0), "nats per sampled token"),
            max_repetition=field(0.7, FRACTION, "share of episodes that repeat themselves"),
            action=field("stop", one_of("stop", "skip"), "beyond a limit; skip leaves the actor as it was"),
        ),
    ),
    sampler=section(
        "The engine that generates text",
        max_num_seqs=field(64, above(0), "sequences decoded together"),
        pools=field(4, above(0), "independent parts of a replica, a thread each; times replicas divides max_num_seqs"),
        page_size=field(0, at_least(0), "tokens per page of K/V; 0 = whole episodes: more memory, less work"),
        num_pages=field(0, at_least(0), "in all pools and replicas; 0 = enough for max_num_seqs longest episodes"),
        prefill_batch=field(4, above(0), "sequences per prefill call"),
        prefill_chunk=field(32, above(0), "tokens of each in one prefill call"),
        decode_steps=field(8, above(0), "tokens of one decode call"),
        prefill_calls=field(0, at_least(0), "at most, before each decode call; 0 = all that is pending"),
        host_gb=field(2.0, at_least(0), "host memory for preempted episodes' K/V; beyond it they are prefilled again"),
        replicas=field(1, above(0), "copies of the model, each on `tensor` devices"),
        tensor=field(1, above(0), "devices that share a copy's heads and vocabulary"),
        attention=field("auto", one_of("auto", "reference", "ragged"), "ragged: the Pallas kernel, for TPUs"),
        engine=field(
            "jax",
            one_of("jax", "vllm", "sglang"),
            "jax: in this process; vllm and sglang: servers, which the fields above do not concern",
        ),
        urls=field((), URLS, "of the servers; each gets all weights and a share of the sessions"),
        model=field("", TEXT, "name of the model at vLLM servers"),
        timeout=field(600.0, above(0), "seconds for one turn, and for reading weights"),
        weights_dir=field("", TEXT, "folder for weights, at the same path on the servers; empty = run_dir/weights"),
        weights_dtype=field("bfloat16", DTYPE, "of the weights in that folder"),
    ),
    placement=section(
        "Devices of sampler and learner",
        sampler=field(
            "colocated",
            one_of("colocated", "disaggregated"),
            "colocated: in turn with the learner, on the first replicas * tensor devices of the process; "
            "disaggregated: on the last ones alone, with config.mesh on the others",
        ),
        offload=field(
            "none",
            one_of("none", "idle"),
            "idle: the idle network's weights and moments, and the whole learner's during sampling, are offloaded to "
            "pinned host memory",
        ),
        weight_sync_bucket_gb=field(1.0, above(0), "GiB of weights in transfer to the sampler at once"),
    ),
    judge=section(
        "Who decides rubrics",
        kind=field("programmatic", one_of("programmatic", "endpoint"), "rubrics' own checks, or a language model"),
        url=field("", TEXT, "OpenAI-compatible endpoint, e.g. a checkpoint of ours under launch.serve_model"),
        model=field("", TEXT, "model name at the endpoint"),
        api_key_env=field("STEPDR_JUDGE_KEY", TEXT, "environment variable that holds the key"),
        checks=field(True, FLAG, "rubrics with a machine-readable check are decided by it, without the model"),
        mapping=field("strict", one_of("strict", "ternary"), "paper: half a merit is none, half a flaw is one"),
        max_missing=field(0.1, FRACTION, "failed judgments above which an episode is masked"),
        per_request=field(8, above(0), "rubrics"),
        attempts=field(3, above(0), "requests at most for the verdict of a rubric"),
        max_tokens=field(4096, above(0), "of a reply"),
        concurrency=field(32, above(0), "requests at once"),
        timeout=field(300.0, above(0), "seconds for one request"),
        keep_replies=field(True, FLAG, "in run_dir/judge_replies.sqlite: equal requests are sent once"),
    ),
    eval=section(
        "Held-out tasks",
        tasks=field(120, above(0), "the same for every stage and seed"),
        samples=field(1, above(0), "episodes per task"),
        temperature=field(1.0, at_least(0), "the official repository's setting"),
        price_per_million_tokens=field(1.0, at_least(0), "arbitrary unit: makes cost comparable, not real"),
        every_tokens=field(0, at_least(0), "training tokens between evaluations in training; paper: 5B; 0 = none"),
        checkpoint_tasks=field(40, above(0), "tasks of such an evaluation"),
        inline=field(True, FLAG, "training waits for it; False = launch.evaluate --watch does it elsewhere"),
    ),
)


def get_config() -> ConfigDict:
    """The defaults. Assigning to a field that does not exist raises an error."""
    return configuration.build_config(FIELDS)
