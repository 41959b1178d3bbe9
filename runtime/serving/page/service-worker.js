// For a page whose host is a plain file server: adds the headers without which WebAssembly has no threads, and answers
// from the last copy where there is no network.

const CACHE = "misf";

self.addEventListener("install", () => self.skipWaiting());
self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));
self.addEventListener("fetch", (event) => {
  const { request } = event;
  if (request.method === "GET" && new URL(request.url).origin === self.location.origin)
    event.respondWith(answer(request));
});

async function answer(request) {
  const cache = await caches.open(CACHE);
  let found;
  try {
    // Asked anew each time, lest files of two versions meet. A page takes no options, but its URL does.
    found = await fetch(request.mode === "navigate" ? request.url : request, { cache: "no-cache" });
    if (found.status === 200) cache.put(request, found.clone()).catch(() => {}); // no room: then not without a network
  } catch (error) {
    found = await cache.match(request);
    if (!found) throw error;
  }
  if (found.status === 0) return found;
  const headers = new Headers(found.headers);
  headers.set("Cross-Origin-Opener-Policy", "same-origin");
  headers.set("Cross-Origin-Embedder-Policy", "require-corp");
  return new Response(found.body, { status: found.status, statusText: found.statusText, headers });
}
