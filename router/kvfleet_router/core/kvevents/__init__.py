"""What the engines really hold, from their KV events, without tokenising a request.

wire.py         one batch of events out of its bytes
stream.py       the sequence of batches of one publisher: gaps, repetitions, restarts
blocks.py       which worker holds which block, named by the bytes of the prompt up to its end
enginecache.py  one engine's names of blocks, and what its events change
walk.py         how far a prompt's bytes lead through the blocks
codec.py        token ids -> bytes, and what a tokenizer does to text before it cuts it
template.py     the model's chat template, rendered as the engine renders it
prompt.py       a request -> the bytes the engine will turn into tokens
view.py         all together, for one model
"""
