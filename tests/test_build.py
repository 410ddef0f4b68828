"""The build keeps its promises: instruction sets apart, torch 2.10's ABI, sentences for what is missing."""
