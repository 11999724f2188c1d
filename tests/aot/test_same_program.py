"""What the planner compiles is what the loop runs: the same text, from real arrays and from abstract ones."""

from stepdr_jax.aot import programs
from stepdr_jax.sharding.mesh import make_mesh
from stepdr_jax.training import loop
from tests.training import tiny


def test_the_loop_runs_the_program_that_the_planner_compiles(tmp_path, monkeypatch):
    stage = "midtrain1"
    config = tiny.tiny_config(tmp_path, **{"midtrain1.steps": 1, "midtrain1.microbatches": 2})

    class Memory(tiny.Memory):
        sources = sorted(name for name, rate in config[stage].mixture.items() if rate)
        families = sources

    ran = []
    make = loop.train_program

    def spied(*arguments, **options):
        program, *abstract = make(*arguments, **options)

        def call(*real):
            ran.append(program.lower(*real).as_text())
            return program(*real)

        return call, *abstract

    monkeypatch.setattr(loop, "train_program", spied)
    loop.train(config, stage, loader=Memory(), vocab_size=config.tokenizer.vocab_size)
    planned, abstract = programs.build_program("train", config, stage, make_mesh(**config.mesh))
    assert ran == [planned.lower(*abstract).as_text()]
    assert len(ran[0]) > 10_000
