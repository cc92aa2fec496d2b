// Keeps every file of this folder once it was loaded, and hands it out with what pages with threads need.

const CACHE = self.location.search; // the version of the folder
const ISOLATED = { "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp" };

self.oninstall = () => self.skipWaiting();
self.onactivate = (event) => event.waitUntil(activate());
self.onfetch = (event) => {
  const { method, url } = event.request;
  if (method === "GET" && url.startsWith(self.registration.scope)) event.respondWith(answer(event));
};

async function activate() {
  for (const name of await caches.keys()) if (name !== CACHE) await caches.delete(name);
  await self.clients.claim();
}

async function answer(event) {
  const { request } = event;
  const cache = await caches.open(CACHE);
  // A new version of the folder is noticed by its page.json, which is asked for anew as long as there is a network.
  const fresh = request.url.endsWith("/page.json");
  const kept = await cache.match(request.url);
  if (kept && !fresh) return kept;
  const found = await fetch(request.url, { cache: "no-cache" }).catch((error) => {
    if (kept) return kept;
    throw error;
  });
  if (found.status !== 200 || found === kept) return kept ?? found;
  const headers = new Headers(found.headers);
  for (const [name, value] of Object.entries(ISOLATED)) headers.set(name, value);
  const isolated = new Response(found.body, { status: 200, headers });
  // Not waited for: the page reads along. What breaks off is not kept.
  event.waitUntil(cache.put(request.url, isolated.clone()).catch(() => {}));
  return isolated;
}
