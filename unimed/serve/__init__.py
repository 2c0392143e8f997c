"""`unimed serve`: an OpenAI-style HTTP front, and a model in a process of its own. `unimed page`: a page in the browser, in one process.

    chat.py      a body of /v1/chat/completions -> what is asked of the worker; its answer -> the response
    images.py    data: URLs and images of hosts that were allowed
    dispatch.py  the queue: batches for the worker, a new worker for a dead one
    worker.py    the process that holds the Session
    api.py       routes        guard.py  what holds for every request       run.py  sockets, signals, start and end

The front never imports torch.

    desk.py      what a visitor of the page does     page.py  its components and events     local.py  its server and uploads
"""
