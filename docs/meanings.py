"""What fields mean whose own line in the code does not say it."""

JOB = {
    "name": "The job's name, for people; its models are in the model store `ddc:<name>`.",
    "trainer": "A name on the sites' own lists of trainers. A site that does not have it declines.",
    "rounds": "How many training rounds; 0 to build a model, or take the given one, and only test it.",
    "sites": "Who takes part. Without it: every site that is enrolled and enabled at the time of submission.",
    "min_sites": "The quorum: so many sites must have answered well for a round to count. Without it: more than half.",
    "min_fraction": "The quorum as a share of the sites, or of the target if there is one.",
    "round_extension_seconds": "How much longer a round may wait in all, in seconds, while a site that is missing "
    "still reports progress; one that reports none is dropped at the deadline.",
    "participation": "Who is asked in a training round, and for whose answers it waits.",
    "late": "What becomes of an update that comes when its site is not waited for any more.",
    "round_deadline_seconds": "How long a round waits for answers, in seconds; what is missing then is dropped.",
    "start_deadline_seconds": "The same for the start, in which sites are asked whether they can take part. "
    "Without it: `round_deadline_seconds`.",
    "seed": "What all random numbers are derived from; the same seed and data give the same model, to the bit.",
    "test_every": "A test round follows after every so many training rounds and after the last; 0 for none.",
    "swag": "After the last training round, collect the weights' first and second moments in one more round.",
    "config": "The trainer's own keys. Each trainer refuses what it does not know.",
    "strategy": "How updates become the new global model; see [strategies](strategies.md).",
    "gate": "What the gate believes of an update that is otherwise as it must be.",
    "initial_model": "Where the first global model comes from. Empty: a site builds it from the seed.",
}
STRATEGY = {"name": "The strategy's name; its options are the table's other keys."}
GATE = {
    "max_examples": "An answer that says it stands for more examples is quarantined.",
    "max_norm": "An update is quarantined whose distance from the global model (L2, over all floating tensors) is "
    "larger. Without it there is no such bound.",
    "outlier_score": "When a round is settled, updates are quarantined that are this much further from the global "
    "model than the others: the modified z-score of the distance's decimal logarithm. At 6 that is a factor of 100 or "
    "more, at 3 one of 10; 0 for no comparison.",
}
PARTICIPATION = {
    "choose": "Whom a training round asks: `all` that are alive; as many as are wanted at `random`, which the seed "
    "repeats; those with most to spare (`available`: free slots, then idle processors, then memory); or by the name of "
    "a function in the coordinator's setting `choosers`.",
    "target_sites": "With so many updates a training round is full and waits for no other.",
    "target_fraction": "The same as a share of the job's sites.",
    "over_selection": "How many sites are asked, as a multiple of the target: 1.3 asks 130 % and takes the first "
    "100 %.",
    "join": "Whether sites that are enrolled or enabled later take part from the next round on, if they offer the "
    "trainer. `fedchord join` and `fedchord leave` do it by hand.",
    "absent_seconds": "A round that does not need a site for its quorum stops waiting when the site's heartbeat has "
    "been missing for so long, in seconds.",
    "pause_after": "A site without a good answer in so many rounds in a row is paused; 0 for never.",
    "pause_seconds": "How long the first pause is, in seconds; then the site is asked again, and each further pause is "
    "twice as long, up to a day.",
}
LATE = {
    "policy": "`drop` takes no late answer; `count` takes it while its round is still open; `keep` also lets a "
    "training round's update count in a later one, and its site is not asked for anything else until then.",
    "within_seconds": "How long after the round's deadline an update may come, with `keep`. Without it: "
    "`round_deadline_seconds`.",
    "max_staleness": "An update counts at the most so many training rounds after its own.",
    "discount": "The exponent a in (1 + staleness)^-a, by which a late update's weight is multiplied; 0 for none.",
}
INITIAL_MODEL = {
    "file": "A .safetensors file; relative to the job file.",
    "model": "The id of a stored model that holds tensors: an earlier job's, or a safetensors file that was put into "
    "the model store.",
}
MESSAGE = {
    "config": "The job file's [config], with what the strategy adds.",
    "deadline_at": "When the answer is due, as unix time in seconds by the broker's clock.",
    "digest": "BLAKE3, hexadecimal; a model's is that of its index.",
    "failed": "Whether the site tried and could not, rather than refused.",
    "metrics": "Measured values by name; nothing where a value was not a finite number.",
    "seconds": "How long the site worked until its update was ready to be sent, in seconds.",
    "seed": "The job's seed; a site derives its own for each round from it.",
    "size": "Bytes.",
    "trainer": "A name on the site's own list.",
    "job_id": "The job.",
    "job_name": "The job's name, for people.",
    "model_id": "The model's id in `model_info`.",
    "shards": "The shards, in the order of the index.",
    "url": "A short-lived reference.",
    "model": "The global model.",
    "build_model": "Whether this site builds the job's first model.",
    "shard_bytes": "How large a shard may be, in bytes.",
    "state": "The state that the job ended in.",
    "reason": "Why, in a sentence.",
    "round": "The training round; 0 before the first.",
    "num_examples": "How many examples the answer stands for: its weight.",
    "attempt": "A fencing number: each asking again has a higher one, and places of its own to write to.",
    "task_id": "The part's name, and its Celery task's id.",
}
TORCH = {
    "batch_size": "Examples in a batch; a last batch of one example joins the one before.",
    "learning_rate": "The optimizer's.",
    "momentum": "Of `sgd`.",
    "weight_decay": "The optimizer's.",
    "optimizer": "It begins anew in every round.",
    "proximal_mu": "FedProx's pull towards the global model; the strategy `fedprox` sets it.",
    "device": "`auto` takes a graphics card if there is one; or `cpu`, `cuda:1`, …",
}
