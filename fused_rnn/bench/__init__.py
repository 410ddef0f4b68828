"""Measuring: ``python -m fused_rnn.bench`` checks and times recurrent layers, ours and others'.

``pip install fused_rnn[bench]`` brings what it needs beyond torch. ``workloads`` says what is run,
``providers`` who runs it, ``measure`` how, ``rows`` what is kept of it.
"""
