"""llama.cpp as edgert uses it: checked libraries, models, contexts, and the tap on the graph."""
