"""Values of options that several commands have; they differ from the defaults."""

SAMPLING = {
    "--max-tokens": ["7"],
    "--temperature": ["0.5"],
    "--top-p": ["0.5"],
    "--top-k": ["5"],
    "--min-p": ["0.5"],
    "--presence-penalty": ["0.5"],
    "--frequency-penalty": ["1.5"],
    "--repetition-penalty": ["1.5"],
    "--seed": ["5"],
    "--kernels": ["ops"],
    "--draft": ["lookup"],
    "--num-draft-tokens": ["3"],
    "--system": ["Be brief."],
    "--think": [],
    "--no-think": [],
}
PLAN = {
    "--bits": ["3"],
    "--group-size": ["32"],
    "--dtype": ["float16"],
    "--recipe": ["q3"],
    "--fit": ["24GB"],
    "--bits-per-weight": ["5"],
    "--prefer": ["speed", "--fit", "24GB"],
    "--context": ["1000", "--fit", "24GB"],
    "--kv-bits": ["8", "--fit", "24GB"],
    "--calibration": ["{calibration}"],
    "--revision": ["v1"],
}
CONVERT = PLAN | {
    "--method": ["gptq"],
    "--experts-layout": ["disk"],
    "--calibrate": [],
    "--calibration-text": ["{text}", "--calibrate"],
    "--finish-tokens": ["64", "--method", "distill", "--calibrate"],
    "--activations-memory": ["1GB", "--method", "distill"],
    "--keep-source": [],
    "--verify": [],
}
FIDELITY = {
    "--text": ["{text}"],
    "--tokens": ["9"],
    "--tasks": [],
    "--mac": ["M4 Max 128GB"],
    "--save": [],
    "--png": ["x.png"],
    "--adapter-path": ["a"],
}
