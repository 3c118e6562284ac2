"""What makes this repository's evidence; not part of the installed package.

    sam       python -m askew_kernels demo --sam    do flat minima survive quantization better?
    search    python -m askew_kernels search        which layer deserves which bits
    accuracy  python -m askew_kernels accuracy      quantized training beside its rivals, on three tasks
    paper     python -m askew_kernels paper         the experiments that the method was published with
    minilm, efficientnet  python -m experiments.minilm  trained models the whole way, beside other libraries
    recipe_search, text_search, finetune_search  python -m experiments.recipe_search  which schedule is recommended

Data, networks, recipe, the training loop and the pool of processes are the demo's (``askew_kernels.demo``), which lends
them and sees nothing of what stands here.
"""
