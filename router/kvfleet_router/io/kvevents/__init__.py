"""Follows the engines' KV events (core/kvevents says what they mean).

feed.py        one publisher: its ZMQ sockets on the event loop
tokenizers.py  a model's tokenizer and chat template, read from its files
follower.py    keeps a feed for every publisher of the fleet, and says what each pool goes by
"""
