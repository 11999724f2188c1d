"""The whole recipe on two CPU cores in half an hour: a tiny Qwen2.5, an offline web of real facts, every stage.

Only sizes differ from a pod's config; the stages, their order and their code are the same. Values without a source are
ours, chosen by measurement on this scale.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.name = "miniature"
    config.run_dir = "runs/miniature"  # everything the run writes; delete it to start over
    config.seed = 0  # training seed: initialisation, data order, sampling
    config.data_seed = 0  # world, tasks, trajectories and splits; shared by all training seeds

    config.offline_web = ConfigDict(
        dict(
            documents="",  # folder of your own md/html/txt/pdf documents, added to the built-in web
            as_of="2026-06-01",  # the date the agent is told; the built-in pages are dated before it
            heldout_share=0.2,  # entities whose questions appear in no training data
        )
    )
    config.tools = ConfigDict(
        dict(
            address="",  # host:port of a running tool host; empty = start one on a free loopback port
            token_env="STEPDR_TOOLS_TOKEN",  # environment variable with its bearer token, if it asks for one
            tls_ca="",  # PEM file of the authority of its certificate; empty = no TLS
            topk=2,  # passages per search query when the agent names no number
            max_observation_chars=700,  # longer tool results are stored; a summary and a path are returned
            fetch_timeout=2.0,  # seconds for one page
            call_timeout=15.0,  # seconds for one tool call, retries included
            concurrency=32,  # calls of one tool at a time; more answer RESOURCE_EXHAUSTED
        )
    )
    config.agent = ConfigDict(
        dict(
            prompt="compact",  # compact (tens of tokens, for tiny models) or full (JSON schemas of every tool)
            max_turns=6,  # recipe: 30
            max_turn_tokens=96,  # tokens an assistant turn may have; recipe: 16K
            max_episode_tokens=640,  # tokens in context, prompt and observations included; recipe: 128K
            max_tool_calls=6,  # calls per episode, enforced by the tool host
            wall_seconds=120.0,  # above it the episode is masked, not punished
        )
    )
    config.teacher = ConfigDict(
        dict(
            endpoint="",  # OpenAI-compatible base URL; empty = the offline expert
            model="",  # model name at the endpoint
            api_key_env="OPENAI_API_KEY",  # environment variable that holds the key
        )
    )
    config.synthesis = ConfigDict(
        dict(
            tasks_per_entity=14,  # training tasks made for one entity, over all kinds
            heldout_tasks=240,  # evaluation tasks
            chinese_share=0.2,  # of tasks
            kind_weights=ConfigDict(dict(fact=0.55, deep_search=0.15, verification=0.1, report=0.2)),
            noise_share=0.08,  # trajectories with a tool error or empty result and its recovery; a seed says 5-10 %
            max_reflections=3,  # paper section 3.3: at most three
            seed_degree=(3, 10),  # paper section 3.2: degree of a seed entity
            subgraph_nodes=(10, 40),  # paper section 3.2
            super_node_degree=1000,  # paper section 3.2: larger ones are leaves
            episode_concurrency=16,  # expert episodes at once
            document_copies=6,  # renamed copies of each passage in the reading data of mid-training
            trajectory_copies=6,  # renamed copies of each trajectory in mid-training II and SFT
        )
    )
    config.data = ConfigDict(
        dict(
            # name -> dict(format=, path=, component=, capability=, lang=, licence=): your own data and public formats, beside
            # what launch.synthesize writes (stepdr_jax/data/sources; configs/own_data.py is an example)
            sources=ConfigDict(),
            shard_mib=256.0,  # of source text in one ArrayRecord
            on_bad_row="stop",  # a source row that cannot be read: stop, or skip (counted and named in data/card.html)
            on_damage="stop",  # a missing or damaged shard while training: stop, or skip (its rows become padding)
            exact_duplicates="count",  # within a component: off, count or drop; renamed copies differ in a word
            near_duplicates="off",  # off, count or drop; renamed copies are near duplicates on purpose
            evaluation_sets=ConfigDict(),  # name -> file of questions that no row may hold (stepdr_jax/data/similarity.py)
            contaminated="drop",  # rows that hold one: drop or count
        )
    )
    config.tokenizer = ConfigDict(
        dict(
            path="",  # a tokenizer.json to use, e.g. Qwen2.5's; empty = train one on the corpus
            vocab_size=768,  # of a trained one: byte-level BPE, control tokens included; Qwen2.5: 151,665
        )
    )
    config.log = ConfigDict(
        dict(
            tensorboard=False,  # event files in each stage's folder, beside metrics.jsonl
            wandb_project="",  # project of Weights & Biases (pip install wandb); empty = off
        )
    )
    config.profile = ConfigDict(
        dict(
            steps=(0, 0),  # first and last step of a trace by jax's profiler; (0, 0) = none is planned
            length=3,  # steps of a trace that is asked for while training runs (runtime/profiling.py)
        )
    )
    config.model = ConfigDict(
        dict(
            hidden_size=64,
            num_layers=2,  # copying needs two; a third delays it (docs/benchmarks.md)
            num_heads=2,
            num_kv_heads=2,  # values as wide as the residual stream: with fewer, copying comes late (docs/benchmarks.md)
            head_dim=32,
            intermediate_size=192,
            rope_theta=1e6,  # Qwen2.5
            rms_norm_eps=1e-6,  # Qwen2.5
            tie_embeddings=True,  # as Qwen2.5 0.5B-3B
            dtype="float32",  # compute
            param_dtype="float32",
            yarn_factor=1.0,  # above 1: rotary angles stretched by YaRN to original_context * yarn_factor tokens
            original_context=32768,  # Qwen2.5's trained length
        )
    )
    config.initial_checkpoint = ""  # folder from launch.convert that first_stage starts from; empty = random parameters
    config.first_stage = "midtrain1"  # midtrain2 or sft leave out what comes before
    config.mesh = ConfigDict(dict(data=1, fsdp=1, context=1, tensor=1))
    config.checkpointing = ConfigDict(
        dict(
            directory="",  # folder, gs://BUCKET/PATH or s3://BUCKET/PATH that gets the stages' checkpoints and
            # milestones as seed<k>/<stage>/...; empty = beside everything else in run_dir
            background=True,  # training goes on while a checkpoint is written
            keep_every=0,  # steps; checkpoints of its multiples are kept for good; 0 = none
        )
    )
    config.watchdog = ConfigDict(
        dict(
            factor=20.0,  # times the median step without a new one: the stacks of all threads are dumped; 0 = never
            floor_seconds=600.0,  # never sooner
            first_seconds=3600.0,  # for the first steps, which compile
            exit=False,  # end with status 75 then, so that a cluster starts the run again
        )
    )
    config.distributed = ConfigDict(
        dict(
            coordinator="",  # host:port of process 0; auto = jax asks the cluster (TPU VMs, GKE, Slurm); empty = alone
            processes=1,  # that take part, with a host:port
            process=0,  # which of them this is
            join_seconds=300.0,  # that the others may take to start; jax's default
            heartbeat_seconds=100.0,  # after which a silent process is taken for dead and all end; jax's default
        )
    )
    config.parallel = ConfigDict(
        dict(
            context_strategy="auto",  # how attention crosses mesh.context: ring, all_gather, ulysses; auto = cheapest
            zigzag=True,  # each context shard holds an early and a late piece of a row, so that causal work is equal
            attention="auto",  # backend: reference, prefix, blockwise, splash (TPU), cudnn (GPU); auto = by device
            remat="none",  # computed again in the backward pass: none, layer (all but its input), attention (all but
            # its input and its attention), offload (as layer; inputs wait in the host's memory)
            vocab_tiles=1,  # slices of the vocabulary whose head is on a chip at a time; the nearest number that divides
        )
    )

    def stage(**overrides) -> ConfigDict:
        base = dict(
            seq_len=256,  # tokens in a row
            batch_size=8,  # rows in a step; small ones learn to copy from fewer tokens
            steps=100,
            learning_rate=2.5e-3,  # at twice this, copying is never learned
            final_learning_rate=2.5e-4,
            warmup_steps=50,
            schedule="wsd",  # wsd (warm-up, stable, decay), cosine (to the final rate) or constant; all warm up
            decay_share=0.3,  # wsd: last part of training over which the rate falls
            weight_decay=0.01,
            beta2=0.95,
            clip_norm=1.0,
            z_loss=1e-4,  # weight of the squared log-partition, which keeps logits from drifting (PaLM); 0 = off
            loss_chunk=2048,  # tokens per slice of the vocabulary loss
            checkpoint_every=100,  # steps
            keep_checkpoints=2,
            log_every=10,  # steps
            heldout_rows=8,  # of each component, never trained on; 0 = all are trained on
            heldout_every=200,  # steps between measurements of the loss on them, and at the end; 0 = never
            microbatches=1,
            guard=ConfigDict(
                dict(
                    norm_factor=10.0,  # a gradient norm above this many times its running mean is skipped; 0 = never
                    norm_window=100,  # steps of that mean; none is skipped before it has seen so many
                    loss_rise=1.5,  # nats per token above the running mean of the same sources: a spike; 0 = never
                    loss_window=5,  # log rows of that mean; a source is not judged before it has so many
                    max_skips=5,  # of log_every steps; with so many the run goes back to the last good checkpoint
                    max_rollbacks=3,  # how often a stage may go back before it stops; 0 = log only. PaLM: about 20 times
                )
            ),
            trajectory_loss="all",  # of trajectories in the data: all tokens (ours), or the assistant's only
            # mixture name -> rate; the rates of the paper's Table 1 and 2 are not published
            mixture=ConfigDict(),
            mixture_schedule=(),  # ((step, dict(component=rate)), ...): from that step on these rates; others stay
            warmup_data="",  # component of the mixture that the first steps read alone
            warmup_data_steps=0,
        )
        return ConfigDict(base | overrides)

    config.midtrain1 = stage(
        steps=2600,
        warmup_data="copying",  # ours: spans of random ids and the same again; without it quoting is not learned in minutes
        warmup_data_steps=1000,
        mixture=ConfigDict(
            dict(
                copying=0.05,
                active_reading=0.2,  # Table 1: general knowledge, QA and rewriting
                quoting=0.25,  # Table 1: rewriting; a span and the same span again teaches copying
                synthetic_knowledge=0.25,  # Table 1: PleIAs-style, invented entities
                summarisation=0.1,
                reasoning=0.1,
                reflection=0.05,
            )
        ),
    )
    config.midtrain2 = stage(
        seq_len=640,
        batch_size=4,
        steps=1200,
        learning_rate=1.5e-3,
        final_learning_rate=1.5e-4,
        mixture=ConfigDict(
            dict(
                url_qa=0.2,  # Table 2
                deep_search_tools=0.4,  # Table 2: deep search with tool calls
                planning_tools=0.1,
                long_summarisation=0.1,
                reflection_tools=0.1,
                dialogue=0.05,
                active_reading=0.05,
            )
        ),
    )
    config.sft = stage(
        seq_len=640,
        batch_size=4,
        steps=600,
        learning_rate=1e-3,
        final_learning_rate=1e-4,
        trajectory_loss="assistant",
        mixture=ConfigDict(dict(sft_deep_search=0.5, sft_deep_research=0.5)),
    )
    config.ppo = ConfigDict(
        dict(
            iterations=60,
            prompts_per_iteration=32,  # tasks per iteration; Open-Reasoner-Zero: 128
            samples_per_prompt=2,  # episodes per task; Open-Reasoner-Zero: 64
            gamma=1.0,  # paper
            gae_lambda=1.0,  # paper
            clip=0.2,  # Open-Reasoner-Zero
            dual_clip=0.0,  # above 1 an action of negative advantage loses at most so many times its advantage; verl: 3; 0 = off
            value_clip=0.2,  # Open-Reasoner-Zero
            actor_learning_rate=3e-4,  # ours; Open-Reasoner-Zero: 1e-6 at 32B
            critic_learning_rate=1e-3,  # ours; Open-Reasoner-Zero: 5e-6
            warmup_steps=5,
            actor_minibatches=1,  # Open-Reasoner-Zero: 1 actor update per iteration
            critic_minibatches=4,  # Open-Reasoner-Zero: 12
            critic_warmup_iterations=3,  # ours
            kl_coefficient=0.0,  # Open-Reasoner-Zero
            entropy_coefficient=0.0,
            loss_aggregation="token_mean",  # token_mean, seq_mean or seq_sum
            whiten=True,
            temperature=1.0,
            clip_norm=1.0,
            beta2=0.95,  # Open-Reasoner-Zero
            truncated_reward="worst",  # reward without an answer: worst (all flaws of the rubrics, none of their merits) or zero
            max_masked_share=0.3,  # above it the iteration is sampled again, then the run stops
            checkpoint_every=5,  # iterations
            keep_checkpoints=2,
            staleness=0,  # 1: an iteration is sampled while the one before is learned from, with the weights before that
            tis_cap=0.0,  # above 0 actions weigh min(trainer's / sampler's probability, this); 0: all alike
            microbatch_sequences=1,  # rows of agent.max_episode_tokens in one forward and backward pass
            remat="none",  # as parallel.remat
            guard=ConfigDict(
                dict(  # ours; 0 = no limit. Healthy runs of the miniature stay far within (docs/ppo.md)
                    max_kl=0.1,  # nats a token between the policies before and after an iteration
                    min_entropy=0.02,  # nats a sampled token
                    max_repetition=0.7,  # share of episodes that repeat themselves
                    action="stop",  # an iteration beyond a limit ends the run; skip: it leaves the actor as it was
                )
            ),
        )
    )
    config.sampler = ConfigDict(
        dict(
            max_num_seqs=64,  # sequences decoded together
            pools=4,  # independent parts on one replica, a thread each; times replicas divides slots
            page_size=0,  # tokens of a page of K/V; 0: pages of whole episodes, which costs memory and saves work
            num_pages=0,  # in all shards and replicas; 0: enough for every slot's longest episode
            prefill_batch=4,  # sequences of one prefill call
            prefill_chunk=32,  # tokens of each in one prefill call
            decode_steps=8,  # tokens of one decode call
            prefill_calls=0,  # before each decode call at most so many; 0: all that is pending
            host_gb=2.0,  # host memory for the K/V of episodes that lost their pages; beyond it they are prefilled again
            replicas=1,  # copies of the model, each on `tensor` devices
            tensor=1,  # devices that share a copy's heads and vocabulary
            attention="auto",  # reference, or ragged: the Pallas kernel, for TPUs
            engine="jax",  # jax: in this process; vllm or sglang: on servers, which the fields above do not concern
            urls=(),  # of the servers, for example ("http://10.0.0.5:8000",); each gets all weights and a share of the sessions
            model="",  # name of the model at vLLM servers
            timeout=600.0,  # seconds for one turn, and for reading weights
            weights_dir="",  # folder for weights, under this path on the servers, too; empty = run_dir/weights
            weights_dtype="bfloat16",  # of the weights in that folder; or float32
        )
    )
    config.placement = ConfigDict(
        dict(
            # colocated: the sampler takes turns with the learner on the first replicas * tensor devices of the process;
            # disaggregated: it has the last ones for itself, and config.mesh the others
            sampler="colocated",
            # idle: weights and moments of the network that is not at work, and all of the learner's while the sampler
            # works, lie in pinned host memory; none: what fits on the devices stays there
            offload="none",
            weight_sync_bucket_gb=1.0,  # GiB, most of the weights on their way from learner to sampler at once; ours
        )
    )
    config.judge = ConfigDict(
        dict(
            kind="programmatic",  # rubrics by their checks; endpoint: by a language model
            url="",  # of an OpenAI-compatible endpoint; a checkpoint of ours is one with launch.serve_model
            model="",  # its name there
            api_key_env="STEPDR_JUDGE_KEY",  # environment variable that holds the key
            checks=True,  # rubrics with a machine-readable check are decided by it, without the model
            mapping="strict",  # paper: half a merit is none, half a flaw is one; ternary is its ablation
            max_missing=0.1,  # share of failed judgments above which an episode is masked
            per_request=8,  # rubrics
            attempts=3,  # requests in which a rubric may come to its verdict
            max_tokens=4096,  # of a reply
            concurrency=32,  # requests at once
            timeout=300.0,  # seconds for one
            keep_replies=True,  # in run_dir/judge_replies.sqlite: equal requests are asked once
        )
    )
    config.eval = ConfigDict(
        dict(
            tasks=120,  # held-out tasks, the same for every stage and seed
            samples=1,  # episodes per task
            temperature=1.0,  # the official repository's setting
            price_per_million_tokens=1.0,  # arbitrary unit: makes cost comparable, not real
            every_tokens=0,  # training tokens between evaluations while a stage trains; recipe: 5B; 0 = none
            checkpoint_tasks=40,  # held-out tasks of such an evaluation
            inline=True,  # training waits for it; False: launch.evaluate --watch does it on another machine
        )
    )
    return config.lock()
