"""Settings under which every experiment takes a moment."""

from io import StringIO

from rich.console import Console

from kvatlas.experiments.lab import Lab
from kvatlas.experiments.settings import Settings
from kvatlas.experiments.sweep import EXPERIMENTS, run_sweep
from kvatlas.records.store import RecordStore

H2O = "h2o(heavy=0.25, recent=0.25)"
OFFLOAD, INFINIGEN = "offload(host)", "rehearse(cap=0.5) | offload(host)"
TINY = Settings(
    strategies=("full", H2O, OFFLOAD, INFINIGEN),
    repeats=2,
    kv_memory="16MiB",
    host_memory="16MiB",
    prompt_tokens=(48, 32),
    breakdown_prompt_tokens=(64,),
    breakdown_output_tokens=4,
    concurrency=(2,),
    concurrency_prompt_tokens=48,
    concurrency_output_tokens=4,
    output_tokens=(3,),
    output_prompt_tokens=32,
    accuracy_tasks=("2 keys",),
    accuracy_context_tokens=(96,),
    accuracy_budgets=(0.3,),
    context_tokens=(96,),
    budgets=(0.3,),
    turns=(1, 2),
    num_prompts=2,
    arrivals=("gamma 0.25",),
    rates=(1000.0,),
    rate_requests=2,
    rate_prompt_tokens=32,
    rate_output_tokens=2,
    models=("random:llama-long",),
    model_prompt_tokens=32,
    model_output_tokens=2,
    model_batch=2,
    traces=("azure-conv",),
    trace_requests=2,
    trace_time_scale=0.0,
    trace_length_scale=0.02,
)


def samples_of(name, settings, strategy=None):
    """Measure the points of an experiment; return them with their samples."""
    lab, experiment = Lab(settings), EXPERIMENTS[name]
    found = []
    for source in experiment.sources(settings):
        for point in experiment.points(settings, lab.name(source)):
            if strategy is None or point.strategy == strategy:
                found.append((point, experiment.measure(point, lab)))
    return found


def sweep(path, settings, *names):
    """Run experiments into a records file; return the outcome and what was printed."""
    printed = StringIO()
    with RecordStore(path) as store:
        outcome = run_sweep(
            [EXPERIMENTS[name] for name in names], settings, store, "test", Console(file=printed, width=200)
        )
    return outcome, printed.getvalue()
