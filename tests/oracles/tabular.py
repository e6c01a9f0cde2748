"""Tabular methods in float64 with plain loops, from the pseudo-code of Sutton and Barto (2018) and Zhao (2025)."""

import numpy as np


def policy_values(transition, reward, terminal, policy, discount):
    """Values of a policy by solving the linear system state by state: rows of (I - discount P) v = r."""
    states, actions, _ = transition.shape
    matrix, right = np.eye(states), np.zeros(states)
    for s in range(states):
        if terminal[s]:
            continue
        for a in range(actions):
            for n in range(states):
                weight = policy[s, a] * transition[s, a, n]
                right[s] += weight * reward[s, a, n]
                if not terminal[n]:
                    matrix[s, n] -= discount * weight
    return np.linalg.solve(matrix, right)


def epsilon_greedy(q, epsilon):
    best = q == q.max()
    return (1 - epsilon) * best / best.sum() + epsilon / len(q)


def episodes_of(stream):
    """The stream, a list of (s, a, r, terminated, s', a', last), cut into episodes."""
    episodes, current = [], []
    for step in stream:
        current.append(step)
        if step[-1]:
            episodes.append(current)
            current = []
    return episodes + [current] if current else episodes


def n_step_control(stream, q, *, target, n, discount, step_size, epsilon=0.0):
    """n-step Sarsa, expected Sarsa, Q-learning and tree backup on recorded steps; n = 1 is the one-step method."""
    q = np.array(q, np.float64)
    for episode in episodes_of(stream):
        length = len(episode)
        for tau in range(length):
            end = min(tau + n, length) - 1  # the last step whose reward counts
            _, _, r, terminated, s, a, _ = episode[end]
            if terminated:
                value = 0.0
            elif target == "sarsa":
                value = q[s, a]
            elif target == "q_learning":
                value = q[s].max()
            else:
                value = epsilon_greedy(q[s], epsilon) @ q[s]
            g = r + discount * value
            for k in range(end - 1, tau - 1, -1):
                _, _, r, _, s, a, _ = episode[k]
                if target == "tree_backup":
                    pi = epsilon_greedy(q[s], epsilon)
                    rest = sum(pi[b] * q[s, b] for b in range(len(pi)) if b != a)
                    g = r + discount * (rest + pi[a] * g)
                else:
                    g = r + discount * g
            s, a = episode[tau][:2]
            q[s, a] += step_size * (g - q[s, a])
    return q


def double_q(stream, q, coins, *, discount, step_size):
    """q [2, S, A]; coins[t] is the table that learns from step t."""
    q = np.array(q, np.float64)
    for (s, a, r, terminated, successor, _, _), i in zip(stream, coins, strict=True):
        follows = 0.0 if terminated else q[1 - i, successor, q[i, successor].argmax()]
        q[i, s, a] += step_size * (r + discount * follows - q[i, s, a])
    return q


def lambda_updates(episode, v, *, discount, lambda_, step_size):
    """Offline TD(lambda) by the forward view: the sum of step_size (G^lambda_t - v(s_t)) over one episode.

    G^lambda_t = (1 - lambda) sum_n lambda^{n-1} G^(n)_t + lambda^{T-t-1} G_t, each n-step return summed anew.
    """
    length, change = len(episode), np.zeros_like(v, np.float64)
    for t in range(length):
        g_lambda = 0.0
        for n in range(1, length - t + 1):
            g = sum(discount**k * episode[t + k][2] for k in range(n))
            terminated, successor = episode[t + n - 1][3:5]
            g += 0.0 if terminated else discount**n * v[successor]
            g_lambda += (lambda_ ** (n - 1)) * (1 - lambda_ if n < length - t else 1.0) * g
        change[episode[t][0]] += step_size * (g_lambda - v[episode[t][0]])
    return change


def td_lambda(stream, v, *, discount, lambda_, step_size, trace):
    """Online TD(lambda) on a table, backward view."""
    v = np.array(v, np.float64)
    for episode in episodes_of(stream):
        z = np.zeros_like(v)
        for s, _, r, terminated, successor, _, _ in episode:
            z *= discount * lambda_
            z[s] = z[s] + 1.0 if trace == "accumulating" else 1.0
            v += step_size * (r + discount * (0.0 if terminated else v[successor]) - v[s]) * z
    return v


def monte_carlo_averages(episode, states, actions, *, discount, first_visit):
    """(sums, counts) of returns after the pairs of one episode, a list of (s, a, r)."""
    sums, counts = np.zeros((states, actions)), np.zeros((states, actions))
    for t, (s, a, _) in enumerate(episode):
        if first_visit and (s, a) in [(s, a) for s, a, _ in episode[:t]]:
            continue
        sums[s, a] += sum(discount**k * r for k, (_, _, r) in enumerate(episode[t:]))
        counts[s, a] += 1
    return sums, counts


def random_walk_error(rng, *, n, step_size, runs, episodes=10, states=19):
    """Root mean square error of n-step TD, averaged over the first episodes and runs (Sutton and Barto, fig. 7.2)."""
    truth, total = np.arange(-states + 1, states, 2) / (states + 1), 0.0
    for _ in range(runs):
        v = np.zeros(states + 2)
        for _ in range(episodes):
            path, rewards = [(states + 1) // 2], []
            while 0 < path[-1] < states + 1:
                path.append(path[-1] + (1 if rng.random() < 0.5 else -1))
                rewards.append({0: -1.0, states + 1: 1.0}.get(path[-1], 0.0))
            for tau in range(len(rewards)):
                end = min(tau + n, len(rewards))
                v[path[tau]] += step_size * (sum(rewards[tau:end]) + v[path[end]] - v[path[tau]])
            total += np.sqrt(np.mean((v[1:-1] - truth) ** 2))
    return total / (runs * episodes)


def cliff_returns(rng, *, method, runs, episodes, step_size=0.5, epsilon=0.1):
    """Returns [runs, episodes] on the cliff; Q-learning, Sarsa or expected Sarsa."""
    returns = np.zeros((runs, episodes))
    moves = [(-1, 0), (0, 1), (1, 0), (0, -1)]
    for run in range(runs):
        q = np.zeros((4, 12, 4))
        for episode in range(episodes):
            cell = (3, 0)
            act = lambda cell: rng.choice(4, p=epsilon_greedy(q[cell], epsilon))
            action = act(cell)
            while cell != (3, 11):
                row = min(max(cell[0] + moves[action][0], 0), 3)
                column = min(max(cell[1] + moves[action][1], 0), 11)
                new, reward = (row, column), -1.0
                if row == 3 and 0 < column < 11:
                    new, reward = (3, 0), -100.0
                next_action = act(new)
                if method == "sarsa":
                    value = q[new][next_action]
                elif method == "q_learning":
                    value = q[new].max()
                else:
                    value = epsilon_greedy(q[new], epsilon) @ q[new]
                q[cell][action] += step_size * (reward + value - q[cell][action])
                cell, action = new, next_action
                returns[run, episode] += reward
    return returns
