"""SGLang with speculative decoding on a CPU, for tests and laptops; slow, and exact.

Stock SGLang serves on a CPU, but its speculative decoding there asks for a compiled package
(``sgl_kernel``) and an attention kernel of one processor family. Four parts replace them:

* ``kernels``: the functions of ``sgl_kernel`` that a CPU server calls, in plain PyTorch;
* ``stand_ins``: packages named ``sgl_kernel`` and ``torchvision``, put on the module search path of
  a server where the real ones are absent; ``environment`` says which variables that takes;
* ``sampling``: what SGLang has CUDA kernels for where a request samples: target-only verification,
  top-k and top-p;
* ``plugin``: an SGLang plugin that teaches the ``torch_native`` attention backend the forward
  passes of speculative decoding, lets requests sample, and lets DFLASH start.

Nothing here does anything unless ``SGLANG_USE_CPU_ENGINE=1``. Limits: SGLang does not overlap
scheduling with a speculative forward on a CPU, and rejection sampling from the draft
(``--speculative-use-rejection-sampling``) is refused there.
"""
