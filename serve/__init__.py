"""The local server: Segmind's API on your own box, and a live page. Knows no diffusion: it asks pipelines for pictures.

verbs/serve.py -> app -> routes_v1, routes_v2, live, page     HTTP and WebSocket, on the event loop
                  app -> guard, keys                          who may ask, and how much
                  routes -> queue -> store                    v2 jobs that outlive the process
                  routes, live -> worker -> drawing           the one thread that owns the device
                                  worker -> residents, line   open models, and whose turn it is
"""
