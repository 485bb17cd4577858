"""Moving one mailbox: copy, cutover, sweep; done by the workers of the store that keeps it.

``account`` is what a worker knows of a mailbox; ``source`` reads the legacy
server, ``maildir`` writes here; ``copying`` brings the one into line with the
other, ``cutover`` flips, ``sweep`` fetches what came late; ``worker`` takes
the tasks from the queue.
"""
