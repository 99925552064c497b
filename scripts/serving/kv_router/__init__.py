"""Which instance gets a request. Pure: no I/O, no tasks, and a clock that is passed in.

router.py         the decision: KvRouter.route
policy.py         the cost of each instance, for each policy
route.py          the decision while the request runs: its share of the instance's load
membership.py     the instances, and everything that they report
event_stream.py   KV events of one instance, in order and without loss
prefix_index.py   block hashes to the instances that hold them (block_tree.py: its structure)
load.py           the load of an instance: its reports, and the requests sent since
breaker.py        when an instance that failed gets requests again
sessions.py       the instance that a session used last
peers.py          decisions of the other frontend processes
"""
