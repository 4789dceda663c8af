"""llama.cpp as edgert uses it: checked libraries, model and context lifetimes, and the tap on its graph."""
