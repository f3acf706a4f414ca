"""Tools that a model may call: how model families write calls, how calls are read from text, what holds a model to one.

Pure: it knows texts and JSON, no tokenizer, no model and no API.
"""
