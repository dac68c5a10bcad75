"""Measure engines that generate: transformers, bare vLLM, vLLM through VLLMModule.

    options.py, environment.py   what is asked for: of the command line, of run_benchmark.sh
    cases.py                     what is measured, and which parallel sizes cannot be
    checks.py                    what else cannot be measured, before anything starts
    workload.py                  the model's directory and the prompts, the same for every case
    run.py                       one case after the other, and what became of it
    processes.py                 a case's processes: one, or one per rank
    child.py                     what such a process does, with one of
        transformers_case.py, vllm_case.py, vllm_module_case.py
    outputs.py                   where results go
    measure.py                   times become numbers
    machine.py, memory.py        devices, and what a model needs of them
    remedies.py                  what a user can do about a failure
    report.py                    the terminal's table, plots and the page
    merge.py                     several runs as one

The process that starts the cases imports neither torch nor vLLM, so it holds no device memory.
"""
